"""The trainer's own model as lm-evaluation-harness sees one, by the name `spantune`. eval/harness.py runs it.

What is asked and how answers are cut is as in the harness's `hf` model, which the tests compare with: context
and continuation are encoded together, inputs that are too long lose their start, an empty context is the
prefix token, generation ends at `until` strings and at the ends that generation_config.json names. Two things
differ on purpose: in bf16 log-probabilities are computed in fp32 from the logits; and an answer ends at its
own `until` string, not when all of a batch have come to theirs.
"""
import json
import logging
from argparse import Namespace
from collections import defaultdict
from functools import cached_property
from hashlib import sha256
from zlib import crc32

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs,
                                  postprocess_generated_text)
from torch import Tensor
from tqdm import tqdm

from eval.common import gather, load, start_ranks
from eval.engine import Sampling
from eval.likelihood import log_likelihoods
from runtime.files import read_json
from runtime.weights import weight_files
from runtime.distributed import rank, shows_progress, wait, world_size

log = logging.getLogger("lm_eval.spantune")
ANSWERS = 16            # generated at once, where --batch_size does not say
MAX_LENGTH = 2048       # where config.json has no max_position_embeddings, as in the harness
SENTINEL = "\ue000continued\ue000"
# What generation_config.json may ask for that is not done here, and the values that ask for nothing.
NEUTRAL = {"repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0), "num_beams": (None, 1),
           "min_p": (None, 0.0), "typical_p": (None, 1.0), "suppress_tokens": (None, [])}


@register_model("spantune")
class HarnessModel(TemplateLM):
    """pretrained: checkpoint folder or hub id; template: chat template for --apply_chat_template, as
    train.py's --template; batch_size: answers generated at once, or "auto"; max_length: of context and
    continuation; micro_batch_tokens: tokens of a row of log-likelihoods. ValueError for what is wrong with
    any of them."""

    def __init__(self, pretrained: str, template: str | None = None, date: str = "", dtype: str = "bf16",
                 device: str = "auto", batch_size: int | str = ANSWERS, max_length: int | None = None,
                 micro_batch_tokens: int = 4096) -> None:
        super().__init__()
        self._rank, self._world_size = rank(), world_size()
        args = Namespace(template=template, date=date, dtype=dtype, device=device)
        self.loaded = load(pretrained, args, start_ranks(args), cast=True)
        self.model, self.words, self._device = self.loaded.model, self.loaded.tokenizer, self.loaded.device
        if self.words.eos_token not in self.words.special:
            raise ValueError(f"{self.words.folder}/tokenizer_config.json names no eos_token that the "
                             "tokenizer has; the harness needs one to end answers with")
        own_length = self.model.config.max_position_embeddings
        self.max_length = int(max_length or own_length or MAX_LENGTH)
        automatic = str(batch_size).startswith("auto")
        self.batch_size = ANSWERS if automatic else int(batch_size)
        self.micro_batch_tokens = int(micro_batch_tokens)
        for name in ("batch_size", "max_length", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        self.generation_config = read_json(self.words.folder / "generation_config.json")

    # ------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return self.words.special[self.words.eos_token]

    @property
    def prefix_token_id(self) -> int:
        return self.words.special.get(self.words.bos_token, self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Special tokens that the text spells are parsed, as served text is. None: BOS where the tokenizer
        adds one and the text does not begin with it."""
        if add_special_tokens is None:
            prefix = self.words.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, prefix)
        bos = [self.words.special[self.words.bos_token]] if add_special_tokens and self.words.adds_bos else []
        return bos + self.words.reference.encode(string, add_special_tokens=False).ids

    # ------------------------------------------------ log-likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not shows_progress())

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False
                              ) -> list[tuple[float, bool]]:
        """requests: [((context, continuation) or None, ids of the context, ids of the continuation)]."""
        longest, cut, tokens = self.max_length, 0, []
        for strings, context, continuation in requests:
            if not continuation or len(continuation) > longest:
                raise ValueError(f"a continuation of {len(continuation)} tokens, {strings!r:.200}: it must "
                                 f"have 1 to {longest}, the model's length (--model_args max_length=N)")
            cut += len(context) + len(continuation) > longest + 1
            tokens.append(((context + continuation)[-longest - 1:-1], continuation))
        if cut:
            log.warning("%d of %d inputs are longer than %d tokens and lose their start",
                        cut, len(tokens), longest)
        results: list = [None] * len(tokens)
        found = log_likelihoods(self.model, tokens, self.micro_batch_tokens)
        for i, total, greedy in tqdm(found, total=len(tokens), desc="log-likelihoods", dynamic_ncols=True,
                                     disable=disable_tqdm or not shows_progress()):
            results[i] = total, greedy
            if requests[i][0] is not None:      # else it is a part of what loglikelihood_rolling() keeps
                self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm)):
            totals[i] += total
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ------------------------------------------------ generation

    @cached_property
    def stop_ids(self) -> set[int]:
        """What generation_config.json, else config.json, ends an answer with; and the tokenizer's
        eos_token."""
        raw = self.model.config.raw
        named = self.generation_config.get("eos_token_id", None if self.generation_config
                                           else raw.get("eos_token_id"))
        return {self.eot_token_id, *([named] if isinstance(named, int) else named or [])}

    def sampling(self, settings: dict) -> Sampling:
        """What is left of a request's generation settings -> Sampling; top_k and top_p as `hf` defaults them.
        ValueError names what is not done here."""
        settings, config = dict(settings), self.generation_config
        sampled, temperature = settings.pop("do_sample"), float(settings.pop("temperature", 0.0))
        top_k = settings.pop("top_k", None)
        top_p = settings.pop("top_p", None)
        if unknown := {name: value for name, value in settings.items() if value not in NEUTRAL.get(name, ())}:
            raise ValueError(f"generation settings {unknown}: not done here; those that are: until, "
                             "max_gen_toks, do_sample, temperature, top_p, top_k (--gen_kwargs changes them)")
        for name, neutral in NEUTRAL.items():
            if config.get(name) not in neutral:
                utils.warning_once(log, f"generation_config.json asks for {name} {config[name]}, which `hf` "
                                        "would do and this does not")
        if not sampled:
            return Sampling()
        if temperature <= 0:
            raise ValueError(f"--gen_kwargs do_sample=True,temperature={temperature}: sampling needs a "
                             "temperature above 0")
        top_k, top_p = (default if value is None else value for value, default in (
            (top_k, config.get("top_k", 50)), (top_p, config.get("top_p", 1.0))))
        return Sampling(temperature, float(top_p), int(top_k or 0), torch.initial_seed() % 2**63)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, request in enumerate(requests):
            context, settings = request.args
            same, repeat = groups[json.dumps(settings, sort_keys=True)], 0
            if settings.get("do_sample"):       # else an answer that is asked for again is the same
                while (context, repeat) in same:
                    repeat += 1
            same[context, repeat].append(i)
        answers = [""] * len(requests)
        with tqdm(total=sum(map(len, groups.values())), desc="answers", dynamic_ncols=True,
                  disable=disable_tqdm or not shows_progress()) as progress:
            for same in groups.values():
                asked, wanted = list(same), list(same.values())
                settings = requests[wanted[0][0]].args[1]
                for n, text in self._answers(asked, settings):
                    for i in wanted[n]:
                        answers[i] = text
                    if not settings.get("do_sample"):
                        self.cache_hook.add_partial("generate_until", (asked[n][0], settings), text)
                    progress.update()
        return answers

    def _answers(self, asked: list[tuple[str, int]], settings: dict):
        """asked: [(context, which answer to it)]. Yields (number, text) as answers end."""
        settings = dict(normalize_gen_kwargs(settings, 256))    # the harness's own default length
        eos = self.words.decode([self.eot_token_id], skip_special_tokens=False)
        until, tokens = handle_stop_sequences(settings.pop("until"), eos), settings.pop("max_gen_toks")
        sampling, room = self.sampling(settings), self.max_length - tokens
        if room < 1:
            raise ValueError(f"max_gen_toks {tokens}: must be less than the model's length "
                             f"{self.max_length}; give --gen_kwargs max_gen_toks=N")
        prompts = [self.tok_encode(context)[-room:] or [self.prefix_token_id] for context, _ in asked]
        until = [text for text in until if text]
        # A text can be spelled with other tokens than the tokenizer would take: look at two more.
        tail = 2 + max(len(self.tok_encode(text, add_special_tokens=False)) for text in until)

        def done(_: int, ids: list[int]) -> bool:
            text = self.words.decode(ids[-tail:], skip_special_tokens=False)
            return any(stop in text for stop in until)

        keys = [(crc32(context.encode()), repeat) for context, repeat in asked]
        for n, ids, _ in self.loaded.engine.answers(prompts, self.stop_ids, tokens, self.batch_size, sampling,
                                                    keys, done=done):
            yield n, postprocess_generated_text(self.words.decode(ids), until, None)

    # ------------------------------------------------ chat templates

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source. ValueError for a name: --template chooses."""
        if isinstance(chat_template, str):
            raise ValueError(f"--apply_chat_template {chat_template}: takes no name here; give --template, "
                             "with a name or FILE.jinja")
        return self.loaded.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
                            ) -> str:
        """As transformers' apply_chat_template, whose continue_final_message is what no generation prompt
        means here; and as `hf`, without the system message where the template refuses it."""
        try:
            return self._render(chat_history, add_generation_prompt)
        except ValueError as error:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            utils.warning_once(log, f"system messages are left out: {error}")
            return self._render(rest, add_generation_prompt)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        if add_generation_prompt:
            return self.loaded.template(messages, add_generation_prompt=True)
        *before, last = messages
        text = self.loaded.template([*before, {**last, "content": f"{last['content']}{SENTINEL} "}])
        if SENTINEL not in text:
            raise ValueError(f"template {self.loaded.template.name} drops the message to be continued")
        text, _, rest = text.rpartition(SENTINEL)
        return text if rest.startswith(" ") else text.rstrip()      # a template that strips would strip here

    @property
    def tokenizer_name(self) -> str:
        """Names the prompts that the harness keeps with --cache_requests: folder and template."""
        template = self.loaded.template
        return f"{self.words.folder}--{sha256(template.source.encode()).hexdigest()[:8]}".replace("/", "__")

    # ------------------------------------------------ what the harness asks besides

    @cached_property
    def identity(self) -> str:
        """Of the checkpoint as it is computed with: another one's answers differ."""
        template = self.loaded.template
        what = [str(self.words.folder.resolve()), str(self.model.head_weight.dtype), self.max_length,
                template and template.source,
                *(file.stat().st_mtime_ns for file in weight_files(self.words.folder))]
        return sha256(json.dumps(what).encode()).hexdigest()[:8]

    def get_model_info(self) -> dict:
        return {"model_num_parameters": sum(p.numel() for p in self.model.parameters()),
                "model_dtype": str(self.model.head_weight.dtype), "max_length": self.max_length}

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The ranks' numbers, (world_size,)."""
        return torch.tensor(gather([tensor.item()]), device=tensor.device)

    def gather_object(self, obj: object, dst: int = 0) -> list | None:
        gathered = gather([obj])
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        wait()
