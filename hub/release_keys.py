"""Which tensor of the authors' checkpoints becomes which of ours, and which are left out.

Two kinds of checkpoint: "videopanda" (the release: STAB under `model.video_tower.`) and "eve" (EVE-7B, the starting point
of stage 1: an image model, whose `model.vision_tower.` has STAB's spatial parts only).
"""

import re
from dataclasses import dataclass

VIDEOPANDA, EVE = "videopanda", "eve"
EMBEDDING, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"
RELEASE_EMBEDDING = "model.embed_tokens.weight"
# Never in the release in a form worth keeping: it is written as zero.
STEP_COUNTER = "model.stab.lste.norm.num_batches_tracked"
RUNNING_STATISTICS = ("model.stab.lste.norm.running_mean", "model.stab.lste.norm.running_var")


@dataclass(frozen=True)
class Rule:
    """What one tensor of the release becomes.

    Args:
        targets: our names. Several: the tensor is cut along its first axis into as many equal parts, in this order.
        num_leading_axes, num_trailing_axes: axes of length 1 that the release's tensor has and ours has not.
    """

    targets: tuple[str, ...]
    num_leading_axes: int = 0
    num_trailing_axes: int = 0

    def source_shape(self, target_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the release's tensor must have, from that of (each of) ours."""
        first, *others = target_shape or (1,)
        stacked = (len(self.targets) * first, *others)
        return (1,) * self.num_leading_axes + stacked + (1,) * self.num_trailing_axes


# (release, ours), each with a weight and a bias.
_SPATIAL_MODULES = (
    ("local_attention.q.0", "lsd.norm_query"),
    ("local_attention.kv.0", "lsd.norm_context"),
    ("local_attention.proj", "lsd.out_proj"),
    ("global_attention.q.0", "fsra.attention.norm_query"),
    ("global_attention.kv.0", "fsra.attention.norm_context"),
    ("global_attention.proj", "fsra.attention.out_proj"),
)
_TEMPORAL_MODULES = (
    ("lmhra1.pos_embed.0", "lste.norm"),
    ("dpe", "lste.position_encoding"),
    ("dec.attn.out_proj", "gstra.out_proj"),
    ("dec.mlp.c_fc", "gstra.fc1"),
    ("dec.mlp.c_proj", "gstra.fc2"),
    ("dec.ln_1", "gstra.norm_query"),
    ("dec.ln_2", "gstra.norm_mlp"),
    ("dec.ln_3", "gstra.norm_context"),
    ("proj.0", "fusion.norm"),
    ("proj.2", "fusion.linear"),
)
_PROJECTOR_MODULES = (("0", "linear_1"), ("2", "linear_2"))

# Single tensors: (release, what it becomes).
_SPATIAL_TENSORS = (
    ("patch_embedding.weight", Rule(("patch_embedding.weight",))),
    ("class_embedding", Rule(("fsra.class_embedding",))),
    ("split_embedding", Rule(("row_embedding",))),
    ("local_attention.q.1.weight", Rule(("lsd.q_proj.weight",))),
    ("local_attention.kv.1.weight", Rule(("lsd.k_proj.weight", "lsd.v_proj.weight"))),
    ("global_attention.q.1.weight", Rule(("fsra.attention.q_proj.weight",))),
    ("global_attention.kv.1.weight", Rule(("fsra.attention.k_proj.weight", "fsra.attention.v_proj.weight"))),
)
_TEMPORAL_TENSORS = (
    ("lmhra1.pos_embed.0.running_mean", Rule(("lste.norm.running_mean",))),
    ("lmhra1.pos_embed.0.running_var", Rule(("lste.norm.running_var",))),
    # Convolutions over (time, row, column): 1 x 1 x 1 ones are linear layers here, 3 x 1 x 1 ones run over time only.
    ("lmhra1.pos_embed.1.weight", Rule(("lste.reduce.weight",), num_trailing_axes=3)),
    ("lmhra1.pos_embed.1.bias", Rule(("lste.reduce.bias",))),
    ("lmhra1.pos_embed.2.weight", Rule(("lste.temporal.weight",), num_trailing_axes=2)),
    ("lmhra1.pos_embed.2.bias", Rule(("lste.temporal.bias",))),
    ("lmhra1.pos_embed.3.weight", Rule(("lste.expand.weight",), num_trailing_axes=3)),
    ("lmhra1.pos_embed.3.bias", Rule(("lste.expand.bias",))),
    ("temporal_cls_token", Rule(("gstra.query",), num_leading_axes=2)),
    ("dec.attn.in_proj_weight", Rule(("gstra.q_proj.weight", "gstra.k_proj.weight", "gstra.v_proj.weight"))),
    ("dec.attn.in_proj_bias", Rule(("gstra.q_proj.bias", "gstra.k_proj.bias", "gstra.v_proj.bias"))),
    ("balance", Rule(("fusion.balance",))),
)

# Regular expressions over whole keys, with the reason.
_DROPPED_ALWAYS = {
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from the configuration",
    r"model\.rotary_emb\.inv_freq": "computed from the configuration",
}
_DROPPED = {
    VIDEOPANDA: {
        r"model\.vision_tower\..+": "the same tensors as model.video_tower",
        r"model\.mm_projector\..+": "the same tensors as model.video_projector",
        r"model\.video_tower\.lmhra2\..+": "an unused twin of lmhra1",
        r"model\.video_teacher\..+": "the teacher",
        r"model\.video_tower_compressor\.teacher_layer\..+": "the teacher",
        r"model\.video_tower\.lmhra1\.pos_embed\.0\.num_batches_tracked": "a step counter, written as zero",
    },
    EVE: {
        r"model\.vision_clip\..+": "the teacher",
        r"model\.vision_tower_compressor\.clip_layer\..+": "the teacher",
        r"model\.vision_tower_compressor\.teacher_layer\..+": "the teacher",
    },
}
_HEAD_PREFIX = {VIDEOPANDA: "model.video_tower_compressor.", EVE: "model.vision_tower_compressor."}
_TEACHER_WIDTH = 1024  # of LanguageBind_Video and of EVE's CLIP alike
_HEAD_KEYS = (
    (re.compile(r"norm_layer\.(\d+)\.0\.(weight|bias)"), r"norms.\1.\2"),
    (re.compile(r"norm_layer\.(\d+)\.1\.(weight)"), r"projections.\1.\2"),
    (re.compile(r"(input|output)_layer\.(weight|bias)"), r"\1.\2"),
)

# What an image model does not have: these parts start fresh.
_FRESH_FROM_EVE = ("lste", "gstra", "fusion", "perceiver_resampler")


def key_map(kind: str, expected: set[str]) -> dict[str, Rule]:
    """Release name -> rule, for every tensor that the release holds and the model has.

    Args:
        kind: "videopanda" or "eve".
        expected: the names of our model's tensors. An EVE checkpoint may feed a model with ablations: what that has no
            place for is not in the map (see `dropped_patterns`).
    """
    tower, projector = _prefixes(kind)
    rules: dict[str, Rule] = {}
    for release, rule in _stab_rules(kind):
        targets = tuple(f"model.stab.{target}" for target in rule.targets)
        if kind == VIDEOPANDA or expected.issuperset(targets):
            rules[tower + release] = Rule(targets, rule.num_leading_axes, rule.num_trailing_axes)
    for release, ours in _PROJECTOR_MODULES:
        for part in ("weight", "bias"):
            rules[f"{projector}{release}.{part}"] = Rule((f"model.projector.{ours}.{part}",))
    # The language model keeps transformers' names, one level further down.
    for name in expected:
        if name.startswith("model.language_model."):
            rules["model." + name.removeprefix("model.language_model.")] = Rule((name,))
    if HEAD in expected:
        rules[HEAD] = Rule((HEAD,))
    return rules


def dropped_patterns(kind: str, expected: set[str], keep_alignment_head: bool) -> dict[str, str]:
    """Regular expressions (to be matched in full) of the keys that are left out, each with the reason."""
    patterns = _DROPPED_ALWAYS | _DROPPED[kind]
    if not keep_alignment_head:
        prefix = re.escape(_HEAD_PREFIX[kind])
        patterns |= {prefix + pattern.pattern: "the alignment head (training only)" for pattern, _ in _HEAD_KEYS}
    if HEAD not in expected:
        patterns[re.escape(HEAD)] = "tied to the input embedding"
    if kind == EVE:
        tower, _ = _prefixes(kind)
        for release, rule in _stab_rules(kind):
            if not expected.issuperset(f"model.stab.{target}" for target in rule.targets):
                patterns[re.escape(tower + release)] = "a part that this configuration leaves out"
    return patterns


def alignment_head_name(kind: str, key: str) -> str | None:
    """Our name of a tensor of the alignment head (`norms.0.weight`, `projections.0.weight`, `input.bias`), or None."""
    prefix = _HEAD_PREFIX[kind]
    if not key.startswith(prefix):
        return None
    for pattern, ours in _HEAD_KEYS:
        match = pattern.fullmatch(key.removeprefix(prefix))
        if match:
            return match.expand(ours)
    return None


def alignment_head_shapes(num_layers: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Our names and the shapes of a whole alignment head: one norm and projection for each of the outputs L, L-4, …, 0."""
    width = _TEACHER_WIDTH
    shapes: dict[str, tuple[int, ...]] = {}
    for place in range(num_layers // 4 + 1):
        shapes[f"norms.{place}.weight"] = shapes[f"norms.{place}.bias"] = (hidden_size,)
        shapes[f"projections.{place}.weight"] = (width, hidden_size)
    shapes |= {"input.weight": (width, hidden_size), "input.bias": (width,)}
    return shapes | {"output.weight": (width, width), "output.bias": (width,)}


def starts_fresh(kind: str, name: str) -> bool:
    """Whether our tensor `name` is one that the checkpoint cannot hold: the temporal parts, if it is EVE's."""
    prefixes = tuple(f"model.stab.{part}." for part in _FRESH_FROM_EVE)
    return kind == EVE and name.startswith(prefixes)


def _prefixes(kind: str) -> tuple[str, str]:
    """The release's names of STAB and of the projector."""
    if kind == VIDEOPANDA:
        return "model.video_tower.", "model.video_projector."
    return "model.vision_tower.", "model.mm_projector."


def _stab_rules(kind: str) -> list[tuple[str, Rule]]:
    modules, tensors = list(_SPATIAL_MODULES), list(_SPATIAL_TENSORS)
    if kind == VIDEOPANDA:
        modules += _TEMPORAL_MODULES
        tensors += _TEMPORAL_TENSORS
    for release, ours in modules:
        tensors += [(f"{release}.{part}", Rule((f"{ours}.{part}",))) for part in ("weight", "bias")]
    return tensors
