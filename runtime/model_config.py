"""config.json of a checkpoint folder: what the model needs of it, checked field by field.

    config = read_config(folder)        # ValueError names what is missing, wrong or not implemented
    config.num_hidden_layers, config.rope["rope_theta"]
"""
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from runtime.files import read_json
from runtime.foreign import shorten
from runtime.start import warn_once
from runtime.tokenizer import stop_ids
from runtime.weights import EMBEDDING, HEAD, checkpoint_tensors, equal

# What it means if a field is absent from config.json, where families differ (transformers' config classes).
# null is different: no grouping of heads, a head size of hidden_size / num_attention_heads, no window.
FAMILIES = {
    "llama": dict(),
    "mistral": dict(num_key_value_heads=8, sliding_window=4096),
    "qwen2": dict(num_key_value_heads=32, sliding_window=4096),
    "qwen3": dict(num_key_value_heads=32, head_dim=128, sliding_window=4096),
}
# Fields that change what the model computes, with the only values that are implemented.
ONLY = {
    "hidden_act": ("silu",), "quantization_config": (None,), "attention_dropout": (0,),
    "partial_rotary_factor": (1,), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "dual_chunk_attention_config": (None,), "add_cross_attention": (None, False),
    "rope_interleaved": (None, False), "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1), "auto_map": (None,), "transformers_weights": (None,),
}
# What a field must be, in words and as a check. In Python true is a number, and JSON may hold NaN.
# The limits are far beyond any model's, and low enough that nothing here takes long or overflows.
COUNT = "a whole number above 0, up to 1,000,000,000", lambda x: type(x) is int and 0 < x <= 10**9
SIZE = "a whole number above 0, up to 1,000,000", lambda x: type(x) is int and 0 < x <= 10**6
LAYERS = "a whole number above 0, up to 1,000", lambda x: type(x) is int and 0 < x <= 1000
WHOLE = "a whole number, 0 or more, up to 1,000,000,000", lambda x: type(x) is int and 0 <= x <= 10**9
POSITIVE = "a finite number above 0, up to 1e30", lambda x: type(x) in (int, float) and 0 < x <= 1e30
FLAG = "true or false", lambda x: type(x) is bool
TEXT = "text", lambda x: type(x) is str
TEXTS = "a list of text", lambda x: type(x) is list and all(type(each) is str for each in x)
OBJECT = "an object", lambda x: type(x) is dict


class _Fields:
    """The fields of a JSON object; null means absent. Called with a field's name and what it must be, returns
    the value, or default if it is absent. ValueError names the field, its value and what it must be."""

    def __init__(self, values: dict, inside: str = ""):
        self.values = {name: value for name, value in values.items() if value is not None}
        self.inside = inside    # "rope_scaling." for the fields of that object

    def __call__(self, name: str, must_be: tuple[str, Callable[[object], bool]], default: object = None
                 ) -> object:
        if name not in self.values:
            return default
        words, fits = must_be
        if not fits(self.values[name]):
            shown = shorten(repr(self.values[name]), 100)
            raise ValueError(f"config.json: {self.inside}{name} is {shown}; it must be {words}")
        return self.values[name]

    def need(self, names: Sequence[str], why: str = "") -> None:
        """ValueError that lists which of these fields are absent."""
        if missing := [name for name in names if name not in self.values]:
            raise ValueError(f"config.json: {why}{', '.join(self.inside + name for name in missing)} "
                             "missing; copy config.json from where the weights came from")

    def refuse(self, only: dict[str, tuple]) -> None:
        """ValueError for a field with a value that is not implemented."""
        for name, allowed in only.items():
            value = self.values.get(name, allowed[0])
            # In Python True == 1.
            if not any(value == each and isinstance(value, bool) == isinstance(each, bool)
                       for each in allowed):
                shown = shorten(repr(value), 100)
                raise ValueError(f"config.json: {self.inside}{name} = {shown} is not implemented, "
                                 f"only {allowed[0]!r}")


@dataclass
class ModelConfig:
    """The fields of config.json that the model needs; raw: all of it, written back when saving."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: dict              # rope_type, rope_theta and what the type needs
    max_position_embeddings: int | None     # tokens; None: config.json does not say
    initializer_range: float                # of weights for training from scratch
    raw: dict = field(repr=False)

    @classmethod
    def from_dict(cls, raw: dict) -> Self:
        """From config.json's content. ValueError names a field that is missing, of a wrong kind, or asks for
        something that is not implemented."""
        if not isinstance(raw, dict):
            raise ValueError(f"config.json: must be a JSON object, not {type(raw).__name__}")
        family = _Fields(raw)("model_type", TEXT)
        if family not in FAMILIES:
            raise ValueError(f"config.json: model_type {family!r} is not implemented; those that are: "
                             f"{', '.join(FAMILIES)}")
        get = _Fields({**FAMILIES[family], **raw})
        get.refuse(ONLY)
        get.need(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                  "num_attention_heads"))
        hidden, layers = get("hidden_size", SIZE), get("num_hidden_layers", LAYERS)
        heads, longest = get("num_attention_heads", SIZE), get("max_position_embeddings", COUNT)
        _refuse_sliding_window(get, family, layers, longest)
        kv_heads = get("num_key_value_heads", SIZE, heads)
        head_dim = get("head_dim", SIZE, hidden // heads)
        if heads % kv_heads or head_dim % 2 or not head_dim:
            raise ValueError(f"config.json: num_attention_heads {heads} must be a multiple of "
                             f"num_key_value_heads {kv_heads}, and head_dim {head_dim} even")
        _check_stops("config.json", raw, get("vocab_size", SIZE))
        attention_bias = get("attention_bias", FLAG, False)
        return cls(
            vocab_size=get("vocab_size", SIZE), hidden_size=hidden,
            intermediate_size=get("intermediate_size", SIZE), num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            rms_norm_eps=float(get("rms_norm_eps", POSITIVE, 1e-6)),
            tie_word_embeddings=get("tie_word_embeddings", FLAG, False),
            qkv_bias={"mistral": False, "qwen2": True}.get(family, attention_bias),
            o_bias=attention_bias and family in ("llama", "qwen3"),
            mlp_bias=get("mlp_bias", FLAG, False) and family == "llama", qk_norm=family == "qwen3",
            rope=_rope(get), max_position_embeddings=longest,
            initializer_range=float(get("initializer_range", POSITIVE, 0.02)), raw=raw)


def _check_stops(file: str, content: dict, vocab_size: int) -> None:
    """ValueError unless eos_token_id, one token or a list of them, is in the vocabulary: a server would never
    stop. (A padding token may be outside; it is never looked up.)"""
    for stop in stop_ids(content):
        if type(stop) is not int or not 0 <= stop < vocab_size:
            shown = shorten(repr(content["eos_token_id"]), 100)
            raise ValueError(f"{file}: eos_token_id is {shown}; it must be below "
                             f"vocab_size, {vocab_size:,}: the id of the token that ends an answer, or a "
                             "list of ids")


def _refuse_sliding_window(get: _Fields, family: str, layers: int, longest: int | None) -> None:
    """ValueError if a layer's attention has a window shorter than the model's context. As in transformers,
    Llama has no window, Mistral has one unless it is null, and only Qwen asks use_sliding_window."""
    qwen, types = family in ("qwen2", "qwen3"), get("layer_types", TEXTS)
    has_window = family == "mistral" or qwen and get("use_sliding_window", FLAG, False)
    window = get("sliding_window", COUNT) if has_window else None
    if qwen:
        # layer_types says which layers have the window. Without it, the window starts at the layer
        # max_window_layers, which may not exist.
        slides = "sliding_attention" in types if types else get("max_window_layers", WHOLE, 28) < layers
        window = window if slides else None
    others = sorted(set(types or ()) - {"full_attention", "sliding_attention" if window else ""})
    if (window and window < (longest or math.inf)) or others:
        of_layers = f", layer_types {', '.join(sorted(set(types)))}" if types else ""
        raise ValueError(f"config.json: sliding_window = {window}{of_layers}: a sliding window is "
                         "not implemented; if no document is longer than the window, set sliding_window to "
                         f"null{' and remove layer_types' * bool(types)}")


def _rope(get: _Fields) -> dict:
    """RoPE's type and parameters, from the old fields (rope_theta, rope_scaling with `type` or `rope_type`)
    or the new one (rope_parameters). If there are both, rope_scaling counts, as in transformers."""
    objects = {name: get(name, OBJECT) for name in ("rope_scaling", "rope_parameters")}
    name = next((name for name in objects if objects[name]), "rope_parameters")
    values = objects[name] or {}
    # As in transformers 5, this field of config.json itself counts more than the object's.
    if original := get("original_max_position_embeddings", COUNT):
        values = {**values, "original_max_position_embeddings": original}
    inner = _Fields(values, f"{name}.")
    inner.refuse({"partial_rotary_factor": (1,)})
    if nested := [key for key, value in values.items() if isinstance(value, dict)]:
        raise ValueError(f"config.json: {name}.{nested[0]}: RoPE by kind of layer is not implemented")
    rope = {"rope_type": inner("rope_type", TEXT, inner("type", TEXT, "default")),
            "rope_theta": inner("rope_theta", POSITIVE, get("rope_theta", POSITIVE, 10000.0))}
    kinds = {"default": {}, "linear": dict(factor=POSITIVE),
             "llama3": dict(factor=POSITIVE, low_freq_factor=POSITIVE, high_freq_factor=POSITIVE,
                            original_max_position_embeddings=COUNT)}
    if rope["rope_type"] not in kinds:
        raise ValueError(f"config.json: RoPE type {rope['rope_type']!r} is not implemented; those that are: "
                         f"{', '.join(kinds)}")
    needs = kinds[rope["rope_type"]]
    inner.need(tuple(needs), f"RoPE type {rope['rope_type']!r}: ")
    rope.update({key: inner(key, must_be) for key, must_be in needs.items()})
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"config.json: {name}.low_freq_factor is {rope['low_freq_factor']}; it must be less "
                         f"than high_freq_factor, {rope['high_freq_factor']}")
    return rope


def read_config(folder: str | Path) -> ModelConfig:
    """config.json of a checkpoint folder. A head that differs from the embedding stays untied, whatever
    config.json says, as in transformers. ValueError if the file is missing, broken or not implemented."""
    folder = Path(folder)
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ValueError(f"{file}: no such file")
    raw = read_json(file)
    try:
        config = ModelConfig.from_dict(raw)
        _check_stops("generation_config.json", read_json(folder / "generation_config.json"),
                     config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if config.tie_word_embeddings:
        stored = checkpoint_tensors(folder)
        embedding, head = stored.get(EMBEDDING), stored.get(HEAD)
        if embedding and head and not equal(embedding, head):
            warn_once(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from {EMBEDDING}: "
                      "the head is trained and saved on its own, with tie_word_embeddings false")
            config = replace(config, tie_word_embeddings=False, raw={**raw, "tie_word_embeddings": False})
    return config
