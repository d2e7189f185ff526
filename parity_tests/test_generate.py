"""The command as a person uses it: what goes to which stream, exit codes, chat, Ctrl-C."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from glm_mlx import command, generate, memory, session, weights
from glm_mlx.gguf import GGUFFile
from glm_mlx.load import open_model
from glm_mlx.make_tiny import TinySpec
from glm_mlx.tokenizer import Tokenizer
from parity_tests.conftest import MakeModel
from parity_tests.fuzz import STRING, File, array, string, value

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "glm_mlx.generate"]


@pytest.fixture(scope="module")
def model(model_file: MakeModel) -> str:
    return str(model_file(TinySpec()))


def run(*arguments: str, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, **environment}
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, cwd=ROOT, env=env, timeout=60)


def report(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """What --json prints, in this process."""
    assert generate.main([*arguments, "--json"]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) == 1
    return json.loads(out)


def test_the_readme_line_prints_text_and_keeps_everything_else_apart(model: str) -> None:
    done = run("--model", model, "Hello", "--no-think", "--count", "12", "--seed", "1")
    assert done.returncode == 0
    assert done.stdout.decode().strip()
    assert re.search(rb"prompt \d+ tokens.*tok/s.*answer 12 tokens", done.stderr)
    assert not re.search(rb"tok/s", done.stdout)


def test_without_a_model_the_small_one_answers_and_says_what_it_is() -> None:
    """Learned, not noise: the working of a sum in the reasoning, the sum in the answer."""
    done = run("What is 47 + 38?", "--temp", "0")
    assert done.returncode == 0
    assert "85" in done.stdout.decode()
    assert b"very small model" in done.stderr
    assert b"7+8=15" in done.stderr


def test_the_same_seed_gives_the_same_text(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    one, again, other = (report(capfd, "-m", model, "Hi", "-n", "20", "--seed", seed) for seed in ("5", "5", "6"))
    assert one["ids"] == again["ids"] != other["ids"]


def test_reasoning_goes_to_standard_error(model: str) -> None:
    """The generation prompt opens the thought, and a model of noise does not close it in 6 tokens."""
    done = run("-m", model, "Hello", "-n", "6", "--seed", "1")
    assert done.stdout == b""
    assert b"inside the reasoning" in done.stderr


@pytest.mark.parametrize("how", ["positional", "--prompt", "-", "stdin"])
def test_a_prompt_may_come_four_ways(model: str, how: str) -> None:
    arguments = {"positional": ["Hello"], "--prompt": ["--prompt", "Hello"], "-": ["-"], "stdin": []}[how]
    stdin = b"Hello" if how in ("-", "stdin") else b""
    done = run("-m", model, *arguments, "-n", "3", "--json", stdin=stdin)
    assert (
        json.loads(done.stdout)["prompt_ids"]
        == json.loads(run("-m", model, "Hello", "-n", "1", "--json").stdout)["prompt_ids"]
    )


def test_bytes_that_are_no_utf_8_reach_the_model_as_they_are(model: str) -> None:
    done = run("-m", model, "--raw", "-n", "1", "--json", stdin=b"a\xff\xfe\x80b")
    assert len(json.loads(done.stdout)["prompt_ids"]) == 5


def test_raw_takes_the_prompt_as_it_stands(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    raw = report(capfd, "-m", model, "--raw", "<|user|>x", "-n", "1")["prompt_ids"]
    chat = report(capfd, "-m", model, "<|user|>x", "-n", "1")["prompt_ids"]
    assert len(raw) == 2
    assert chat[3:-2] != raw[:1], "typed control tokens stay text in a chat"
    assert len(chat) > 8


def test_a_chat_template_of_the_users_takes_the_place_of_the_files(
    model: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("<|user|>{% generation %}{{ messages[0].content }}{% endgeneration %}<|user|>")
    own = report(capfd, "-m", model, "--chat-template", str(template), "<|user|>", "-n", "1")["prompt_ids"]
    tokenizer = Tokenizer(GGUFFile(model).metadata)
    assert own == [tokenizer.id("<|user|>"), *tokenizer.encode("<|user|>"), tokenizer.id("<|user|>")]


@pytest.mark.parametrize(
    ("packed", "says"),
    [
        (value(STRING, "{% if %}"), "the chat template failed: "),
        (array(STRING, 1, string("x")), "tokenizer.chat_template is ['x'], not a string"),
    ],
    ids=["fails", "no string"],
)
def test_raw_and_a_template_of_the_users_need_none_of_the_files(
    model: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, packed: bytes, says: str
) -> None:
    file = File.read(Path(model)).put("tokenizer.chat_template", packed).write(tmp_path / "model.gguf")
    assert generate.main(["-m", str(file), "x"]) == 2
    assert says in capfd.readouterr().err
    assert len(report(capfd, "-m", str(file), "--raw", "<|user|>x", "-n", "1")["prompt_ids"]) == 2
    (tmp_path / "own.jinja").write_text("x")
    assert report(capfd, "-m", str(file), "--chat-template", str(tmp_path / "own.jinja"), "y", "-n", "1")


def test_json_reports_log_probabilities_and_figures(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    got = report(capfd, "-m", model, "Hi", "-n", "4", "--logprobs", "2", "--temp", "0")
    assert [entry["logprob"] == entry["top"][0][1] for entry in got["logprobs"]] == [True] * 4
    assert got["finish_reason"] in ("length", "stop")
    assert got["stats"]["prompt_tokens"] == len(got["prompt_ids"])


def test_benchmark_prints_every_token_with_its_bytes(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["-m", model, "Hi", "--benchmark", "5", "--seed", "1"]) == 0
    err = capfd.readouterr().err
    assert [line.split()[1] for line in err.splitlines() if re.match(r"│ +\d", line)] == ["2", "3", "4", "5"]
    assert all(word in err for word in ("token", "ms", "tok/s", "GB/s"))


def test_help_names_every_option_and_starts_at_once() -> None:
    done = run("-h")
    assert done.returncode == 0
    for option in (
        "--model",
        "--chat",
        "--system",
        "--drop-reasoning",
        "--no-think",
        "--raw",
        "--chat-template",
        "--context",
        "--benchmark",
        "--json",
        "--verbose",
        "--seed",
    ):
        assert option.encode() in done.stdout
    assert max(map(len, done.stdout.decode().splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "missing.gguf", "x"], "missing.gguf"),
        (["--tmp", "1"], "--tmp"),
        (["x", "--temperature", "hot"], "hot"),
        (["x", "--temperature", "-1"], "temperature is -1"),
        (["x", "--top-p", "1.5"], "top-p is 1.5"),
        (["x", "--min-p", "nan"], "min-p is nan"),
        (["x", "--seed", "-3"], "seed is -3"),
        (["x", "--count", "0"], "count is 0"),
        (["x", "--benchmark", "1"], "benchmark is 1"),
        (["x", "--context", "0"], "context is 0"),
        (["x", "--context", "4097"], "4,096"),
        (["x", "--context", "all"], "all"),
        (["x", "--context", "2"], "context of 2"),
        (["x", "--drop-reasoning"], "--chat"),
        (["x", "--logit-bias", "a=b"], "a=b"),
        (["x", "--logit-bias", "99999=1"], "99999"),
        (["x", "--logprobs", "2"], "--json"),
        (["x", "--prompt", "y"], "two prompts"),
        (["--chat", "--json"], "--json"),
        (["--chat", "hello"], "--chat"),
        (["x", "--raw", "--no-think"], "--no-think"),
        (["x", "--raw", "--system", "y"], "--system"),
        (["x", "--raw", "--chat-template", "y"], "--chat-template"),
        (["x", "--chat-template", "missing.jinja"], "'missing.jinja': No such file"),
        (["   "], "empty"),
        (["word " * 5000], "context"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_be_used_gets_one_line_and_exit_code_2(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    try:
        code = generate.main(arguments)
    except SystemExit as left:
        code = left.code
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("no --model")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert says in lines[0]


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_a_hub_model_without_a_network_is_one_line(network: dict[str, str]) -> None:
    """Offline by wish, and by a connection that is refused."""
    done = run("--model", "owner/repo:Q4_0", "x", **network)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert b"owner/repo:Q4_0" in done.stderr


def test_a_cached_hub_model_runs_without_a_network(model: str, tmp_path: Path) -> None:
    """The hub library's own cache layout, as a download leaves it."""
    repo = tmp_path / "hub" / "models--owner--repo"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc")
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "M-Q4_0.gguf").symlink_to(model)
    environment = {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run("--model", "owner/repo", "Hello", "-n", "2", "--json", **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["model"].endswith("M-Q4_0.gguf")


@pytest.mark.parametrize("name", ["foo/.bar", "foo/bar--baz", "foo/bar.git"])
def test_names_that_the_hub_does_not_have_are_one_line(name: str) -> None:
    done = run("--model", name, "x")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, b"", 1)
    assert name.encode() in done.stderr


def test_json_is_json_whatever_the_numbers_are(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    got = report(capfd, "-m", model, "Hi", "-n", "2", "--logit-bias", "5=-inf", "--logprobs", "3")
    assert got["sampling"]["logit_bias"] == {"5": "-inf"}


@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        ("<&-", 2, "no prompt"),
        ("--chat <&-", 0, ""),
        ("Hello --no-think -n 3 > /dev/full", 2, "error: cannot go on"),
        ("Hello --no-think -n 3 2>&-", 0, ""),
        ("Hello --no-think -n 3 >&-", 0, ""),
    ],
)
def test_closed_and_full_streams_bring_no_traceback(model: str, redirection: str, code: int, says: str) -> None:
    command = f"{sys.executable} -m glm_mlx.generate -m {model} {redirection}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert done.returncode == code
    assert says in done.stderr.decode()


def test_an_ascii_terminal_gets_what_it_can_show(model: str) -> None:
    bias = ["--logit-bias", "200=100"]  # a byte above ASCII
    done = run("-m", model, "--raw", "Grüße", "-n", "3", *bias, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr


def test_ctrl_c_ends_with_130_and_no_traceback(model: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "-m", model, "Hello", "--no-think", "-n", "4000", *never_stops(model)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        err = process.stderr.read()
        assert process.wait(20) == 130
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[malloc] Unable to allocate 9 bytes."),
        RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory (00000008)"),
        MemoryError("9 bytes"),
    ],
    ids=str,
)
def test_a_full_memory_is_one_line(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise error

    assert command.run(full) == 2
    assert capsys.readouterr().err.startswith(f"error: out of memory: {error}; use a shorter prompt")


def test_an_error_that_nobody_expected_is_not_hidden() -> None:
    def broken() -> int:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="do not fit"):
        command.run(broken)


def test_a_reader_that_stops_early_is_no_error(model: str) -> None:
    command = f"{sys.executable} -m glm_mlx.generate -m {model} Hello --no-think -n 300 | head -c 5"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr
    assert b"Exception" not in done.stderr


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: str, command: Sequence[str] = COMMAND):
        self.process, self.end = pty.fork()
        if self.process == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [*command, *arguments])
        self.seen = ""

    def wait_for(self, pattern: str, seconds: float = 30, press: str = "") -> str:
        """Read on until the pattern stands in what came since the last call.

        `press` is typed first, and again where nothing comes: a signal that reaches Python just before readline waits
        for a key is seen only after that key.
        """
        text, until = "", time.monotonic() + seconds
        self.type(press)
        while not re.search(pattern, text):
            left = until - time.monotonic()
            ready, _, _ = select.select([self.end], [], [], max(0.0, min(left, 2.0) if press else left))
            if not ready and press and left > 0:
                self.type(press)
                continue
            assert ready, f"no {pattern!r} in {text!r}"
            try:
                text += os.read(self.end, 4096).decode("utf-8", "replace")
            except OSError:  # the program has gone
                break
        self.seen += text
        return text

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def never_stops(model: str) -> list[str]:
    """Options that forbid every stop token, so that only Ctrl-C ends an answer."""
    stops = sorted(Tokenizer(GGUFFile(model).metadata).stop_ids)
    return [part for token in stops for part in ("--logit-bias", f"{token}=-inf")]


def test_chat_answers_resets_and_survives_ctrl_c(model: str) -> None:
    chat = Terminal("-m", model, "--chat", "--no-think", "-n", "3000", "--verbose", *never_stops(model))
    chat.wait_for("> ")
    for turn in range(2):
        chat.type("Hello\n")
        chat.wait_for("Hello\r\n(.|\n){20}")
        chat.type("\x03")
        figures = chat.wait_for(r"peak memory (.|\n)*> ")
        assert bool(re.search(r"\([\d,]+ cached\)", figures)) == bool(turn), "a second turn computes only what is new"
    chat.type("/reset\n")
    chat.wait_for("forgotten(.|\n)*> ")
    chat.wait_for("/exit(.|\n)*> ", press="\x03")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.seen


IMPATIENT = """
import sys
from glm_mlx import generate, session
session.PATIENCE = 0
sys.exit(generate.main())
"""


def test_ctrl_c_in_a_long_prompt_keeps_the_chat_and_what_was_read(model: str) -> None:
    """It stops after the chunk in hand; a bar has shown how it goes. A turn without an answer leaves no trace."""
    system = "The cat runs over the house and the dog runs under it. " * 70
    arguments = ("-m", model, "--chat", "--no-think", "-n", "20", "--verbose", "--system", system)
    chat = Terminal(*arguments, command=(sys.executable, "-c", IMPATIENT))
    chat.wait_for("> ")
    chat.type("Hello\n")
    seen = chat.wait_for(r" \d+ tok/s .*\d:\d\d")
    assert re.search(r"reading the prompt .* (512|1024)/1\d{3}", seen)
    chat.type("\x03")
    chat.wait_for("this turn is forgotten(.|\n)*> ")
    assert chat.seen.rfind("\x1b[?25l") < chat.seen.rfind("\x1b[?25h"), "the cursor stays hidden"
    chat.type("Hello\n")
    figures = re.search(r"prompt ([\d,]+) tokens \(([\d,]+) cached\)", chat.wait_for(r"peak memory (.|\n)*> "))
    assert figures
    assert int(figures[1].replace(",", "")) > 1536
    assert int(figures[2].replace(",", "")) >= 512  # on a busy machine Ctrl-C comes late, at worst in the last chunk
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert "Traceback" not in chat.seen


@pytest.mark.parametrize("cached", [0, 9000])
def test_the_bar_knows_the_speed_after_one_chunk_and_counts_no_cached_tokens(cached: int) -> None:
    with session._PrefillBar() as bar:
        bar.update(cached, 10_000)
        time.sleep(0.1)
        bar.update(cached + 100, 10_000)
        (task,) = bar.progress.tasks
        assert 100 < (task.speed or 0) < 1001
        assert task.time_remaining


def test_a_short_prompt_has_no_bar(model: str) -> None:
    chat = Terminal("-m", model, "Hello", "--no-think", "-n", "5")
    chat.wait_for("peak memory")
    assert chat.exit_code() == 0
    assert "reading the prompt" not in chat.seen


def turns(*arguments: str) -> list[tuple[int, int]]:
    """Tokens of the prompt, and of those in the cache, for three turns with the small model."""
    talk = b"What is 47 + 38?\nWhat is 12 + 9?\nHello\n"
    done = run("--chat", "--temp", "0", "--verbose", *arguments, stdin=talk)
    assert done.returncode == 0
    found = re.findall(rb"prompt (\d+) tokens(?: \((\d+) cached\))?", done.stderr)
    assert len(found) == 3
    return [(int(prompt), int(cached or 0)) for prompt, cached in found]


def test_a_chat_that_is_full_says_how_to_go_on() -> None:
    done = run("--chat", "--temp", "0", "--context", "65", stdin=b"What is 47 + 38?\nWhat is 12 + 9?\n/reset\nHello\n")
    assert done.returncode == 0
    errors = re.findall(rb"error: .*", done.stderr)
    assert len(errors) == 1
    assert re.fullmatch(rb"error: the prompt has \d+ tokens, .* the context of 65; .*; /reset starts anew", errors[0])


def test_a_turn_of_a_chat_computes_only_what_it_adds() -> None:
    """Reasoning and all, by the figures of --verbose; with --drop-reasoning each answer is read again without it."""
    kept, dropped = turns(), turns("--drop-reasoning")
    new = [prompt - cached for prompt, cached in kept]
    assert new[0] == kept[0][0] == dropped[0][0]
    assert new[1] < new[0], "the second question is as long as the first, which had a system prompt before it"
    assert new[2] < new[1]
    assert all(kept[n][1] >= kept[n - 1][0] for n in (1, 2))
    assert dropped[2][0] < kept[2][0] - 20
    assert dropped[0][0] - 2 <= dropped[1][1] <= dropped[0][0]


def test_the_memory_plan_comes_before_the_weights(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert generate.main(["-m", model, "Hi", "-n", "2", "--context", "1000", "--verbose"]) == 0
    err = capfd.readouterr().err
    assert 0 < err.index("cache of 1,000 tokens") < err.index("loaded in")
    room = open_model(model, context=1000).memory.total
    monkeypatch.setattr(memory, "machine_memory", lambda: (room, "a test"))
    monkeypatch.setattr(weights, "load", None)
    assert generate.main(["-m", model, "Hi", "--context", "1001"]) == 2
    err = capfd.readouterr().err
    assert re.fullmatch(r"error: a context of 1,001 tokens needs .*; --context 1\d{3} would fit\n", err)


def test_a_context_that_is_full_ends_the_answer_and_says_so(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["-m", model, "Hi", "-n", "2000", "--context", "60", *never_stops(model)]) == 0
    err = capfd.readouterr().err
    assert "the context of 60 tokens is full" in err
    used = re.search(r"prompt (\d+) tokens.* answer (\d+) tokens", err)
    assert used
    assert int(used[1]) + int(used[2]) == 60


def test_the_limits_of_the_memory_plan_hold_while_it_runs_and_no_longer(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = cache_limit(), []
    monkeypatch.setattr(session.Engine, "generate", lambda *rest: iter(during.append(cache_limit()) or ()))
    assert generate.main(["-m", model, "Hi", "--context", "100"]) == 0
    assert during[0] != before == cache_limit()
    monkeypatch.setattr(session, "leave_broken_kernels", None)  # so that it fails
    with pytest.raises(TypeError):
        generate.main(["-m", model, "Hi"])
    assert cache_limit() == before


def cache_limit() -> int:
    limit = mx.set_cache_limit(0)
    mx.set_cache_limit(limit)
    return limit


def test_the_terminal_is_left_as_it_was_after_ctrl_c(model: str) -> None:
    run_ = Terminal("-m", model, "Hello", "--no-think", "-n", "4000", *never_stops(model))
    run_.wait_for("[a-z]{3}")
    run_.type("\x03")
    run_.wait_for("never")
    assert run_.exit_code() == 130
    assert run_.seen.rfind("\x1b[?25l") < run_.seen.rfind("\x1b[?25h"), "the cursor stays hidden"
    assert "Traceback" not in run_.seen
