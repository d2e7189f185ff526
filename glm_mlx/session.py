"""What `generate` does once its arguments are read: load, encode, generate, print."""

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import mlx.core as mx
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from glm_mlx.console import Console
from glm_mlx.conversation import Conversation
from glm_mlx.engine import Engine, Step
from glm_mlx.errors import InputError, NotNumbersError
from glm_mlx.hub import resolve
from glm_mlx.load import Loaded, open_model
from glm_mlx.model import decode_bytes
from glm_mlx.output import OutputSplitter, Part
from glm_mlx.sampling import SamplingParams
from glm_mlx.self_test import leave_broken_kernels
from glm_mlx.small import SMALL_MODEL
from glm_mlx.template import ChatTemplate, file_template, read_template
from kernels.shown import shown

STDERR = Console(stderr=True, highlight=False, emoji=False)
CHAT_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
BENCHMARK_PROMPT = "Tell me a long story."
PATIENCE = 2.0  # seconds that a prompt may take before a progress bar shows how it goes


@dataclass
class Answer:
    reasoning: str = ""
    text: str = ""
    steps: list[Step] = field(default_factory=list)
    finish: str = "length"  # or "stop", "interrupted"


def run(args: argparse.Namespace) -> int:
    """Raises InputError and KeyboardInterrupt, for `generate.main` to answer."""
    _check(args)
    prompt = None if args.chat else _prompt(args)
    opened = open_model(_model_path(args), context=args.context, kv_bits=args.kv_bits)
    if args.verbose:
        STDERR.print(opened.memory.table())
    template = None if args.raw else _template(args, opened.gguf.metadata)  # before loading takes its time
    with opened.memory.limits():
        loaded = opened.load()
        for line in leave_broken_kernels(loaded.model):
            STDERR.print(line, markup=False, soft_wrap=True)
        talk = _Talk(loaded, args, _sampling(args, loaded), template)
        if args.verbose:
            _describe(loaded, talk.params)
        for note in loaded.notes:
            STDERR.print(f"note: {note}", markup=False, soft_wrap=True)
        return _chat(talk) if prompt is None else _answer_once(talk, prompt)


class _Talk:
    """A loaded model, a conversation with it, and how its answers are printed. Without a template, `raw` prompts."""

    def __init__(self, loaded: Loaded, args: argparse.Namespace, params: SamplingParams, template: ChatTemplate | None):
        self.loaded, self.args, self.params = loaded, args, params
        self.engine = Engine(loaded.model, context=loaded.memory.context)
        if template is not None:
            self.conversation = Conversation(
                loaded.tokenizer, template, args.system, not args.no_think, keep_reasoning=not args.drop_reasoning
            )

    def encode_raw(self, text: str) -> list[int]:
        """The text as it stands: names of special tokens in it are meant as such."""
        tokenizer = self.loaded.tokenizer
        ids = tokenizer.encode(text, special=True)
        if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids.insert(0, tokenizer.bos_id)
        return ids

    def generate(self, ids: list[int]) -> Answer:
        """Generate, and print as it comes. Ctrl-C ends the answer, which then says "interrupted"."""
        tokenizer, answer, benchmark = self.loaded.tokenizer, Answer(), self.args.benchmark
        stop_ids = tokenizer.stop_ids if benchmark is None else frozenset[int]()
        splitter = OutputSplitter(tokenizer, starts_inside=ids[-1:] == [tokenizer.think_open_id])
        # A benchmark runs one token further than it shows: the last one has no look-ahead beside it.
        count = self.args.count if benchmark is None else benchmark + 1
        try:
            with _PrefillBar() as bar:
                steps = self.engine.generate(ids, self.params, count, stop_ids, bar.update)
                for step in steps:
                    answer.steps.append(step)
                    if step.token in stop_ids:
                        answer.finish = "stop"
                    else:
                        self._take(answer, splitter.push(step.token))
                    if len(answer.steps) == benchmark:
                        break
        except KeyboardInterrupt:
            answer.finish = "interrupted"
        finally:  # an error's line comes below what was printed before it
            self._take(answer, splitter.finish())
            if answer.text and not self.args.json:
                print(flush=True)
        if notice := self._notice(ids, answer):
            STDERR.print(notice if self.args.json else f"\n{notice}", soft_wrap=True)
        return answer

    def _notice(self, ids: list[int], answer: Answer) -> str | None:
        """Why an answer ended that the model did not end. None where `--benchmark` or Ctrl-C did."""
        if len(ids) + len(answer.steps) == self.engine.context:
            more = "; /reset starts anew, --drop-reasoning keeps more turns" if self.args.chat else ""
            return f"the context of {self.engine.context:,} tokens is full{more}"
        if answer.finish != "length" or self.args.benchmark is not None:
            return None
        if not answer.text:
            return "no answer yet: it stopped inside the reasoning; raise --count or use --no-think"
        return (
            f"the answer is cut off: --count allows {self.args.count:,} tokens, reasoning included; raise it for more"
        )

    def _take(self, answer: Answer, parts: list[tuple[Part, str]]) -> None:
        for part, text in parts:
            if part != "reasoning":  # calls of tools are printed as the model wrote them
                if answer.reasoning and not answer.text and not self.args.json:
                    STDERR.print("\n")
                answer.text += text
                if not self.args.json:
                    print(text, end="", flush=True)
            else:
                answer.reasoning += text
                if not self.args.json:
                    STDERR.print(text, end="", style="dim", markup=False, soft_wrap=True)


class _PrefillBar:
    """A progress bar while a prompt is read, on a terminal, from `PATIENCE` seconds on; gone when it is done."""

    def __init__(self) -> None:
        columns = (TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
        self.progress = Progress(*columns, console=STDERR, transient=True, disable=not sys.stderr.isatty())
        self.task = self.progress.add_task("", total=None)
        self.lock, self.is_over = threading.Lock(), False
        self.timer = threading.Timer(PATIENCE, self._show)  # a chunk may take longer than that
        self.timer.daemon = True

    def update(self, done: int, total: int) -> None:
        if self.progress.tasks[0].total is None:
            # What is in the cache took no time: speed counts from here.
            self.progress.update(self.task, completed=done, total=total)
            self.progress.advance(self.task, 0)
            self.timer.start()
        self.progress.update(self.task, completed=done)
        if done == total:
            self._close()

    def _show(self) -> None:
        with self.lock:
            if not self.is_over:
                self.progress.start()

    def _close(self) -> None:
        self.timer.cancel()
        with self.lock:
            self.is_over = True
            self.progress.stop()

    def __enter__(self) -> "_PrefillBar":
        return self

    def __exit__(self, *exc: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._close()


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if not task.speed else f"{task.speed:,.0f} tok/s")


def _check(args: argparse.Namespace) -> None:
    """What can be wrong with the options themselves, found before a model loads."""
    if args.count < 1:
        raise InputError(f"count is {args.count}; it must be 1 or more")
    if args.benchmark is not None and args.benchmark < 2:
        raise InputError(f"benchmark is {args.benchmark}; it must be 2 tokens or more")
    if args.text is not None and args.prompt is not None:
        raise InputError("there are two prompts, PROMPT and --prompt; give one")
    if args.drop_reasoning and not args.chat:
        raise InputError("--drop-reasoning is about the turns of --chat; add that or leave it out")
    for option in ("raw", "json", "benchmark"):
        if args.chat and getattr(args, option):
            raise InputError(f"--chat and --{option} do not go together; leave one out")
    if args.chat and (args.text is not None or args.prompt is not None):
        raise InputError("--chat asks for its prompts itself; leave the prompt out")
    for option in ("system", "no_think"):
        if args.raw and getattr(args, option):
            raise InputError(f"--raw has no chat template to put --{option.replace('_', '-')} into; leave one out")
    if args.raw and args.chat_template is not None:
        raise InputError("--raw uses no chat template; leave out --raw or --chat-template")
    if args.logprobs is not None and not args.json:
        raise InputError("--logprobs needs --json; add it")
    _sampling(args, None)


def _prompt(args: argparse.Namespace) -> str:
    text = args.text if args.text is not None else args.prompt
    if text is None and args.benchmark is not None:
        return BENCHMARK_PROMPT
    if text is None or text == "-":
        if sys.stdin is None or (sys.stdin.isatty() and text is None):
            raise InputError("there is no prompt; write one in quotes after the options, or use --chat (see -h)")
        # Bytes that are no UTF-8 come through as surrogates, which the tokenizer turns back into those bytes.
        text = _standard_input().decode("utf-8", "surrogateescape")
    if not text.strip():
        raise InputError("the prompt is empty; write what the model is to answer")
    return str(text)


def _template(args: argparse.Namespace, metadata: Mapping[str, Any]) -> ChatTemplate:
    given = args.chat_template
    return ChatTemplate(file_template(metadata) if given is None else read_template(given))


def _standard_input() -> bytes:
    """All of it. Raises InputError where it is non-blocking and its end has not come."""
    parts: list[bytes] = []
    while part := sys.stdin.buffer.read():
        parts.append(part)
    if part is None:  # never a part of a prompt for the whole
        raise InputError("standard input is non-blocking and has no more data yet; give the prompt as an argument")
    return b"".join(parts)


def _model_path(args: argparse.Namespace) -> Path:
    if args.model is not None:
        return resolve(args.model)
    STDERR.print(
        "no --model: this is the very small model that ships with glm-mlx, to show that it works. "
        "The real one: --model OWNER/REPO:Q4_0 from the hub, or a .gguf file of GLM-4.7-Flash",
        style="dim",
        soft_wrap=True,
    )
    return SMALL_MODEL


def _sampling(args: argparse.Namespace, loaded: Loaded | None) -> SamplingParams:
    """Options first, then the file's advice. Without a file: only to see whether the options are in range."""
    advice: dict[str, Any] = asdict(loaded.config.sampling) if loaded else {}
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    given = {name: getattr(args, name) for name in (*names, "logprobs") if getattr(args, name) is not None}
    seed = time.time_ns() if args.seed is None else args.seed
    return SamplingParams(**{**advice, **given, "logit_bias": dict(args.logit_bias), "seed": seed})


def _answer_once(talk: _Talk, prompt: str) -> int:
    args, loaded = talk.args, talk.loaded
    ids = talk.encode_raw(prompt) if args.raw else talk.conversation.ask(prompt)
    answer = talk.generate(ids)
    if args.json:
        print(json.dumps(_plain(_report(talk, ids, answer)), ensure_ascii=False, allow_nan=False))
    if args.benchmark is not None:
        _benchmark_table(loaded, answer)
    if answer.steps:
        _figures(talk.engine)
    if answer.finish == "interrupted":
        raise KeyboardInterrupt
    return 0


def _chat(talk: _Talk) -> int:
    with suppress(ImportError):  # line editing and history, where Python has them
        import readline  # noqa: F401
    STDERR.print(CHAT_HELP, style="dim")
    conversation = talk.conversation
    asks = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    if not asks and sys.stdin is not None and not os.get_blocking(sys.stdin.fileno()):
        raise InputError(
            "standard input is non-blocking, so the end of a turn can't be waited for; use a pipe or a file"
        )
    while True:
        try:
            text = input("> " if asks else "")
        except KeyboardInterrupt:
            STDERR.print("\n" + CHAT_HELP, style="dim")
            continue
        except (EOFError, RuntimeError):  # the end of standard input, or none at all
            STDERR.print()
            return 0
        if text.strip() in ("/exit", "/quit"):
            return 0
        if text.strip() == "/reset":
            conversation.reset()
            STDERR.print("the conversation is forgotten", style="dim")
            continue
        if not text.strip():
            continue
        try:
            prompt = conversation.ask(text)
            answer = talk.generate(prompt)
            if not answer.steps:
                STDERR.print("stopped before there was an answer; this turn is forgotten", style="dim")
                continue
            conversation.add(text, prompt, [step.token for step in answer.steps], answer.reasoning, answer.text)
        except KeyboardInterrupt:  # before or after an answer
            continue
        except NotNumbersError:  # no turn would be better
            raise
        except InputError as error:  # too long for the context, say: the conversation before this turn stays
            turns = any(message["role"] == "user" for message in conversation.messages)
            STDERR.print(f"error: {shown(error)}{'; /reset starts anew' * turns}", markup=False, soft_wrap=True)
            continue
        if talk.args.verbose:
            _figures(talk.engine)


def _describe(loaded: Loaded, params: SamplingParams) -> None:
    cfg = loaded.config
    mix = ", ".join(f"{n} {kind}" for kind, n in loaded.quant_mix.items())
    fixed, per_row = decode_bytes(cfg, loaded.weights, loaded.model.row_format)
    STDERR.print(
        f"model    {shown(cfg.name)}: {cfg.architecture}, {cfg.num_layers} layers, {cfg.num_experts} experts, "
        f"{cfg.num_experts_per_tok} used, context {cfg.context_length:,}\n"
        f"file     {shown(loaded.gguf.path)}: {decimal(loaded.nbytes)} of weights ({mix}), "
        f"loaded in {loaded.seconds:.2f} s\n"
        f"runs on  {mx.default_device()}, activations {str(loaded.model.dtype).removeprefix('mlx.core.')}, "
        f"MLX {version('mlx')}\n"
        f"a token needs {decimal(fixed)} of weights and {decimal(per_row)} for each token before it\n"
        f"sampling temperature {params.temperature:g}, top-k {params.top_k}, top-p {params.top_p:g}, "
        f"min-p {params.min_p:g}, seed {params.seed}",
        soft_wrap=True,
        markup=False,
    )


def _figures(engine: Engine) -> None:
    s = engine.stats
    cached = f" ({s.cached_tokens:,} cached)" if s.cached_tokens else ""
    STDERR.print(
        f"\\[prompt {s.prompt_tokens:,} token{'s' * (s.prompt_tokens != 1)}{cached}, {s.prefill_tok_s:.1f} tok/s; "
        f"answer {s.decode_tokens:,} token{'s' * (s.decode_tokens != 1)}, {s.decode_tok_s:.1f} tok/s; "
        f"first after {s.time_to_first_token:.2f} s; peak memory {decimal(s.peak_memory)}]",
        style="dim",
        soft_wrap=True,
    )


def _benchmark_table(loaded: Loaded, answer: Answer) -> None:
    """Every token, the first ones too: what is warm-up and what is not can be seen."""
    fixed, per_row = decode_bytes(loaded.config, loaded.weights, loaded.model.row_format)
    table = Table("token", "ms", "tok/s", "GB/s", title="decode, token by token")
    for column in table.columns:
        column.justify = "right"
    for n, step in enumerate(answer.steps[1:], 2):  # the first comes from the prefill
        per_second = 1 / step.seconds if step.seconds else math.inf  # a clock may stand still
        rate = (fixed + per_row * step.position) * per_second / 1e9
        table.add_row(str(n), f"{step.seconds * 1e3:.2f}", f"{per_second:.1f}", f"{rate:.2f}")
    STDERR.print(table)


def _plain(value: Any) -> Any:
    """The same with numbers that JSON does not have as text: "-inf"."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _report(talk: _Talk, ids: list[int], answer: Answer) -> dict[str, Any]:
    loaded, stats = talk.loaded, talk.engine.stats
    tokenizer = loaded.tokenizer
    report: dict[str, Any] = {
        "model": str(loaded.gguf.path),
        "prompt_ids": ids,
        "ids": [step.token for step in answer.steps],
        "text": answer.text,
        "reasoning": answer.reasoning,
        "finish_reason": answer.finish,
        "sampling": asdict(talk.params),
        "stats": asdict(stats) | {"prefill_tok_s": stats.prefill_tok_s, "decode_tok_s": stats.decode_tok_s},
    }
    if talk.params.logprobs is not None:
        report["logprobs"] = [
            {
                "token": tokenizer.token(step.token),
                "logprob": step.logprob,
                "top": [[tokenizer.token(token), value] for token, value in step.top_logprobs or []],
            }
            for step in answer.steps
        ]
    return report
