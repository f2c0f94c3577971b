"""The words of ShapesQA: a tokenizer of about 130 whole words, and the processor around it."""

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from video_panda import VideoPandaImageProcessor, VideoPandaProcessor, VideoPandaVideoProcessor, training_samples

IMAGE_SIZE, PATCH_SIZE = 64, 8  # px: 4 x 4 tokens of 2 x 2 patches, 168 tokens a clip of 8 frames
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
# The chat template's system prompt says nothing that this model could use: all of it is one word.
SYSTEM_PROMPT = Regex(r"A chat between a curious (human|user) and .*?'s questions\.")
SYSTEM_WORD = "SYSTEM"
WORD = Regex(r"[\w<>/]+:?|[^\w\s]")
_NUM_CLIPS_READ = 400  # enough to have met every word


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer; the same on every call."""
    words = {SYSTEM_WORD, "USER:", "ASSISTANT:"}
    splitter = pre_tokenizers.Split(WORD, behavior="removed", invert=True)
    for content in ("captions", "questions"):
        for words_seed in (0, 1):
            for sample in training_samples(range(_NUM_CLIPS_READ), content, words_seed):
                for turn in sample["conversations"]:
                    text = turn["value"].removeprefix("<video>\n")
                    words.update(word for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(SYSTEM_PROMPT, SYSTEM_WORD)
    tokenizer.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def make_processor(use_row_token: bool = True, **sizes) -> VideoPandaProcessor:
    """The processor of a model that looks at 64 px; other `sizes` go to its video and image processors."""
    sizes = {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, **sizes}
    parts = VideoPandaImageProcessor(**sizes), VideoPandaVideoProcessor(**sizes), make_tokenizer()
    return VideoPandaProcessor(*parts, use_row_token=use_row_token)
