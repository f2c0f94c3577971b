"""Ask a checkpoint about a video: python examples/ask.py MODEL CLIP "QUESTION"."""

import sys

from transformers import AutoModel, AutoProcessor, TextStreamer

model_id, clip, question = sys.argv[1:]
model = AutoModel.from_pretrained(model_id, trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)

chat = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": question}]}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs.to(model.device), do_sample=False, max_new_tokens=64, streamer=streamer)
