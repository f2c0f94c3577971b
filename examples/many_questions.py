"""Ask several questions about one clip: python examples/many_questions.py MODEL CLIP "QUESTION" "QUESTION" ...

The clip is decoded, encoded and put through the language model once: a question computes only what it does not share with
the one before.
"""

import sys

from transformers import AutoModel, AutoProcessor

model_id, clip, *questions = sys.argv[1:]
model = AutoModel.from_pretrained(model_id, trust_remote_code=True, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)

frames, _ = processor.video_processor.fetch_videos(clip)
cache = model.prefix_cache()
for question in questions:
    chat = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    output = model.generate(**inputs.to(model.device), past_key_values=cache, do_sample=False, max_new_tokens=64)
    answer = output[0, inputs["input_ids"].shape[1] :]
    print(f"{question} {processor.decode(answer, skip_special_tokens=True)}")
