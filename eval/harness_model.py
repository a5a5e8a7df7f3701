"""The trainer's own model as a model of lm-evaluation-harness. eval/harness.py runs it.

Prompts, cuts and stops are those of the harness's `hf` model, and the tests compare with it: context and
continuation are encoded together, inputs that are too long lose their start, an empty context becomes the
prefix token, and generation ends at the `until` strings and at the stop tokens of generation_config.json. Two
things differ on purpose. In bf16, log-probabilities are computed in fp32 from the logits. An answer ends at
its own `until` string, not when all answers of its batch have reached theirs.
"""
import json
import logging
from argparse import Namespace
from collections import defaultdict
from hashlib import sha256

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs,
                                  postprocess_generated_text)
from torch import Tensor

from eval.common import gather, load, progress, start_ranks
from eval.engine import Sampling
from eval.likelihood import log_likelihoods
from runtime.distributed import rank, wait, world_size
from runtime.files import read_json
from runtime.tokenizer import stop_ids
from runtime.weights import model_fingerprint

log = logging.getLogger("lm_eval.spantune")
# The harness's own defaults, where config.json has no max_position_embeddings and a task no max_gen_toks.
MAX_LENGTH, MAX_NEW_TOKENS = 2048, 256
# Marks the end of a message that the model is to continue.
SENTINEL = "\ue000continued\ue000"


class HarnessModel(TemplateLM):
    """pretrained: checkpoint folder or hub id; template: chat template, as train.py's --template; batch_size:
    answers generated at once; max_length: tokens of context and continuation; micro_batch_tokens: tokens of a
    row of log-likelihoods. ValueError for a bad checkpoint or template."""

    def __init__(self, pretrained: str, template: str | None = None, date: str = "", dtype: str = "auto",
                 device: str = "auto", batch_size: int = 16, max_length: int | None = None,
                 micro_batch_tokens: int = 4096) -> None:
        super().__init__()
        self._rank, self._world_size = rank(), world_size()
        args = Namespace(template=template, date=date, dtype=dtype, device=device)
        self.loaded = load(pretrained, args, start_ranks(args), cast=True)
        self.model, self.words, self._device = self.loaded.model, self.loaded.tokenizer, self.loaded.device
        if self.words.eos_token not in self.words.special:
            raise ValueError(f"{self.words.folder}/tokenizer_config.json: eos_token {self.words.eos_token} "
                             "is not a token of the tokenizer; name the one that ends an answer")
        self.batch_size, self.micro_batch_tokens = batch_size, micro_batch_tokens
        self.max_length = max_length or self.model.config.max_position_embeddings or MAX_LENGTH
        self.generation_config = read_json(self.words.folder / "generation_config.json")
        if self.generation_config.get("repetition_penalty") not in (None, 1):
            log.warning("generation_config.json sets repetition_penalty. `hf` applies it to answers, but "
                        "this model does not")

    # ------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        return self.words.special[self.words.eos_token]

    @property
    def prefix_token_id(self) -> int:
        return self.words.special.get(self.words.bos_token, self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Text to ids. Special tokens in the text become their ids. add_special_tokens None: BOS where the
        tokenizer adds one and the text does not begin with it."""
        if add_special_tokens is None:
            prefix = self.words.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, prefix)
        bos = [self.words.special[self.words.bos_token]] if add_special_tokens and self.words.adds_bos else []
        return bos + self.words.reference.encode(string, add_special_tokens=False).ids

    # ------------------------------------------------ log-likelihoods

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False
                              ) -> list[tuple[float, bool]]:
        """requests: [((context, continuation) or None, ids of the context, ids of the continuation)]."""
        longest, tokens = self.max_length, []
        for strings, context, continuation in requests:
            if not 0 < len(continuation) <= longest:
                raise ValueError(f"a continuation of {len(continuation)} tokens, {strings!r:.200}: it must "
                                 f"have 1 to {longest}, the model's length (--model_args max_length=N)")
            if len(context) + len(continuation) > longest + 1:
                utils.warning_once(log, f"inputs longer than {longest} tokens lose their start")
            # The last token is only predicted.
            tokens.append(((context + continuation)[-longest - 1:-1], continuation))
        results: list = [None] * len(tokens)
        found = log_likelihoods(self.model, tokens, self.micro_batch_tokens)
        for i, total, greedy in progress(found, len(tokens), "log-likelihood"):
            results[i] = total, greedy
            # loglikelihood_rolling() asks without strings: its windows are not requests of their own.
            if requests[i][0] is not None:
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
        return totals

    # ------------------------------------------------ generation

    @property
    def stop_ids(self) -> set[int]:
        """The tokenizer's eos_token, and what generation_config.json names, or without one config.json."""
        return {self.eot_token_id, *stop_ids(self.generation_config or self.model.config.raw)}

    def sampling(self, do_sample: bool, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, num_beams: int = 1, **unknown: object) -> Sampling:
        """A request's generation settings, without `until` and lengths. top_k and top_p default as in `hf`.
        ValueError names settings that are not supported."""
        if unknown or num_beams != 1:
            raise ValueError(f"generation settings {unknown or {'num_beams': num_beams}}: not supported; "
                             "supported are until, max_gen_toks, do_sample, temperature, top_p, top_k "
                             "(--gen_kwargs changes them)")
        if not do_sample:
            return Sampling()
        if temperature <= 0:
            raise ValueError(f"--gen_kwargs do_sample=True,temperature={temperature}: sampling needs a "
                             "temperature above 0")
        top_k = self.generation_config.get("top_k", 50) if top_k is None else top_k
        top_p = self.generation_config.get("top_p", 1.0) if top_p is None else top_p
        # Ranks have different documents, and draw different numbers for them.
        seed = (torch.initial_seed() + self.rank) % 2**63
        return Sampling(float(temperature), float(top_p), int(top_k or 0), seed)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        # Requests with the same settings are answered together.
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(i)
        answers = [""] * len(requests)
        eos = self.words.decode([self.eot_token_id], skip_special_tokens=False)
        for group in groups.values():
            settings = dict(normalize_gen_kwargs(requests[group[0]].args[1], MAX_NEW_TOKENS))
            until = [text for text in handle_stop_sequences(settings.pop("until"), eos) if text]
            most = settings.pop("max_gen_toks")
            if most >= self.max_length:
                raise ValueError(f"max_gen_toks {most}: must be less than the model's length "
                                 f"{self.max_length}; give --gen_kwargs max_gen_toks=N")
            prompts = [self.tok_encode(requests[i].args[0])[most - self.max_length:] or [self.prefix_token_id]
                       for i in group]

            def done(_: int, ids: list[int]) -> bool:
                text = self.words.decode(ids, skip_special_tokens=False)
                return any(stop in text for stop in until)

            made = self.loaded.engine.answers(prompts, self.stop_ids, most, self.batch_size,
                                              self.sampling(**settings), done=done)
            for n, ids, _ in progress(made, len(group), "answer"):
                i = group[n]
                answers[i] = postprocess_generated_text(self.words.decode(ids), until, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    # ------------------------------------------------ chat templates

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the template that --template chose."""
        return self.loaded.template.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
                            ) -> str:
        """Renders a conversation as transformers does. Without a generation prompt the last message is to be
        continued. As in `hf`, system messages are left out if the template refuses them."""
        *before, last = chat_history
        if not add_generation_prompt:
            last = {**last, "content": f"{last['content']}{SENTINEL} "}
        try:
            text = self.loaded.template([*before, last], add_generation_prompt)
        except ValueError as error:
            without = [message for message in chat_history if message["role"] != "system"]
            if len(without) == len(chat_history):
                raise
            utils.warning_once(log, f"system messages are left out: {error}")
            return self.apply_chat_template(without, add_generation_prompt)
        if add_generation_prompt:
            return text
        text, _, tail = text.rpartition(SENTINEL)
        # The space behind the sentinel is gone if the template strips messages. It would strip this one too.
        return text if tail.startswith(" ") else text.rstrip()

    # The harness asks for it with every chat template, to name a cache of prompts, which is never used.
    tokenizer_name = ""

    # ------------------------------------------------ files and ranks

    @property
    def identity(self) -> str:
        """A hash of all that decides an answer: weights, tokenizer, precision, length, template, and what
        generation_config.json says of stops and sampling."""
        template = self.loaded.template
        parts = [model_fingerprint(self.words.folder), self.words.fingerprint,
                 str(self.model.head_weight.dtype), self.max_length, template and template.source,
                 self.generation_config]
        return sha256(json.dumps(parts).encode()).hexdigest()[:8]

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One number of each rank, (world_size,)."""
        return torch.tensor(gather([tensor.item()]), device=tensor.device)

    def gather_object(self, obj: object, dst: int = 0) -> list:
        return gather([obj])

    def barrier(self) -> None:
        wait()
