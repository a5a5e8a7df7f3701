"""What a run says: lines on the terminal or in a log file, the progress bar, the tables at its end; and the
signals that ask it to stop."""
import dataclasses
import errno
import os
import signal
import sys
import textwrap
from collections.abc import Iterator, Sized
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.distributed import is_main, shows_progress
from runtime.foreign import printable
from runtime.machine import Crowding
from runtime.start import WIDTH, print_message, silence, stop_signals


# Why standard output could not be written, if it could not. A reader that has gone is no reason.
output_faults: list[str] = []


def say(text: str = "") -> None:
    """Print on rank 0, above the progress bar. If the terminal or the reader (`| tee`) is gone, the program
    goes on: one Ctrl-C may have asked both to end, and a run has to save. So it does, with a warning and a
    note in output_faults, where output is a file on a full disk."""
    if is_main():
        try:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            silence(sys.stdout)
            if error.errno not in (errno.EPIPE, errno.EIO):
                output_faults.append(error.strerror)
                print_message(f"warning: standard output: {error.strerror}; nothing more is printed there")


def ending(text: str, width: int) -> str:
    """One printable line; of a long one its end, since that is where paths differ."""
    text = printable(text).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= width else "..." + text[3 - width:]


def describe(config: object) -> str:
    """The values of a dataclass of flags that are not empty, in lines of 79 columns."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    text = " ".join(f"{name}={value}".replace(" ", "\0") for name, value in values.items()
                    if value not in ("", None, []))
    wrapped = textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
                            break_on_hyphens=False)
    return "configuration\n" + wrapped.replace("\0", " ")


def counted(number: int, noun: str) -> str:
    """1 file, 2,000 files"""
    plural = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{plural}"


def describe_data(config: object, dataset: object, usable: Sized, held_out: Sized | None, steps: object,
                  total_steps: int, positions: int | None) -> str:
    """What will be trained on; and where that is not what the flags suggest: examples without a completion,
    files given twice, examples longer than the model was trained for. config: config.Config; dataset:
    data.Dataset; usable: the examples to train on; held_out: the data.Dataset of --eval-fraction, if any;
    steps: data.Steps; positions: config.json's max_position_embeddings."""
    report, lengths, incomplete = dataset.report, dataset.lengths, dataset.without_completion
    left_out = len(dataset) - len(usable)
    if held_out:
        left_out, incomplete = left_out - len(held_out), incomplete - held_out.without_completion
    held = f", {len(held_out):,} held out for evaluation" if held_out else ""
    lines = [f"data: {counted(len(usable), 'example')}, {counted(int(lengths[usable].sum()), 'token')}; "
             f"{counted(total_steps, 'step')}, {steps.per_epoch:,} an epoch",
             f"  {counted(report['records'], 'record')}: {report['truncated']:,} truncated, "
             f"{report['dropped_overlong']:,} dropped as too long, {report['dropped_empty']:,} as empty,",
             f"  {left_out:,} left out{held}"]
    if report["empty_answers"]:
        lines += [f"warning: {counted(report['empty_answers'], 'record')} with an empty answer: only its end "
                  "is trained"]
    if steps.draws:
        sizes = np.bincount(dataset.names_of(usable))
        lines += [f"  an epoch has {counted(draw, 'example')} of {file}, which has {size:,}"
                  for file, draw, size in zip(config.train_data, steps.draws, sizes)]
    if incomplete and config.require_completion:
        lines += [f"  {incomplete:,} of these because they have no completion (cut off at --max-length, or",
                  "  of weight 0): the same under every --loss; --no-require-completion keeps them"]
    elif incomplete:
        lines += [f"warning: {counted(incomplete, 'example')} without a completion; --loss im and lm train",
                  "  on these, it does not: with --no-require-completion, losses have different",
                  "  examples and steps"]
    if twice := len(dataset.files) - len({Path(file).resolve() for file in dataset.files}):
        lines += [f"warning: --train-data names {twice} file(s) more than once; their records count",
                  "  once for each mention"]
    if positions and (longer := int((lengths[usable] > positions).sum())):
        lines += [f"warning: {counted(longer, 'example')} longer than the model's max_position_embeddings, "
                  f"{positions};", f"  --max-length {positions} would cut them"]
    return "\n".join(lines)


class StopSignal:
    """Notes stop_signals() within a `with` block, which ends with the earlier handlers back in place. The
    loop asks between steps, so the current step is finished and saved. number: of the signal, 0 if none has
    come; doing: what the user is told will happen first."""

    def __enter__(self) -> "StopSignal":
        self.number, self.doing = 0, "finishing this step, then saving"
        self.earlier = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        # torchrun sends TERM, too, when another rank has failed: that rank's error is what to read.
        if not self.number and "WORLD_SIZE" not in os.environ:
            say(f"{signal.Signals(number).name}: {self.doing}")
        self.number = self.number or number


class Progress:
    """A bar on a terminal; in a log file, a line now and then."""

    def __init__(self, first_step: int, total_steps: int):
        self.terminal = shows_progress()
        # Short enough to leave ten columns of eighty to the bar, four where there are 100,000 steps.
        self.bar = tqdm(total=total_steps, initial=first_step, disable=not self.terminal, dynamic_ncols=True,
                        bar_format="{n_fmt}/{total_fmt} {bar} {remaining} left{postfix}")
        self.crowding: Crowding | None = Crowding()     # until it has warned

    def update(self, record: dict, line: bool) -> None:
        """Show one more step; record: its line of metrics.jsonl; line: whether a log file gets one."""
        # Five characters a number: 0.123, 12.34, 12345, 1e+05.
        shown = {name: f"{value:.3f}"[:5] if value < 1e5 else f"{value:.0e}"
                 for name in ("loss", "completion", "instruction")
                 if (value := record[name if name == "loss" else f"nll_{name}"]) is not None}
        speed = tqdm.format_sizeof(record["tokens_per_second"])
        self.bar.set_postfix_str(" ".join(f"{name[:5]} {value}" for name, value in shown.items())
                                 + f" {speed} tok/s", refresh=False)
        self.bar.update()
        if line and not self.terminal:
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            say(f"step {record['step']}/{self.bar.total}: {values}, {speed} tok/s")
        if self.crowding and (warning := self.crowding.warning()):
            say(warning)
            self.crowding = None

    def close(self) -> None:
        self.bar.close()


def changes(before: dict, after: dict) -> Iterator[tuple[str, str, dict, float | None]]:
    """Of two evaluations, lines of eval.jsonl: each file and kind of span with the later result and the
    earlier NLL a token, None where the first did not have the same records."""
    by_content = {before["contents"][name]: kinds for name, kinds in before["data"].items()}
    for name, kinds in after["data"].items():
        for kind, result in kinds.items():
            old = by_content.get(after["contents"][name], {}).get(kind, {}).get("nll_token_mean")
            yield name, kind, result, old


def print_change(before: dict, after: dict) -> None:
    """The table at the end: held-out NLL of each kind of span in two evaluations, as of changes()."""
    # As wide as the longest name, as far as the line allows.
    width = max(12, min(25, max(map(len, after["data"]))))
    say(f"\nheld-out NLL, nats a token, at step {before['step']} and step {after['step']}")
    say(f"{'data':<{width}} {'span':<12}{'tokens':>9}{'before':>12}{'after':>9}{'change':>9}")
    for name, kind, result, old in changes(before, after):
        value = result["nll_token_mean"]
        shown, change = ("-", "-") if old is None else (f"{old:.4f}", f"{value - old:+.4f}")
        say(f"{ending(name, width):<{width}} {kind:<12}{result['tokens']:>9,}{shown:>12}{value:>9.4f}"
            f"{change:>9}")
    if "exact_match" in after:
        comparable = before["contents"] == after["contents"] and before.get("answers") == after["answers"]
        say(f"\nexact match on {after['answers']} held-out answers: "
            + (f"{before['exact_match']:.1%} before, " if comparable else "")
            + f"{after['exact_match']:.1%} after")


def show_answers(answers: list[dict]) -> None:
    """The first two answers with their prompts, right or wrong."""
    for answer in answers[:2]:
        for name in ("prompt", "expected", "output"):
            text = printable(answer[name])
            if len(text) >= 600:
                text = f"{text[:300]} [...] {text[-300:]}"
            say(textwrap.fill(f"{name + ':':<10}{text}", WIDTH, subsequent_indent=" " * 10,
                              initial_indent="\n" if name == "prompt" else ""))
