"""The model: configuration, STAB and the video-language model. These files are shipped beside a checkpoint's weights."""
