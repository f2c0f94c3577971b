"""From a file to model inputs: geometry, decoding, processors. These files are shipped beside a checkpoint's weights."""
