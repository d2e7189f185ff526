"""The command as a person uses it: what goes to which stream, exit codes, chat, Ctrl-C."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import pytest

from glm_mlx import command, generate, memory, session, weights
from glm_mlx.engine import Engine, Step
from glm_mlx.gguf import GGUFFile
from glm_mlx.load import open_model
from glm_mlx.make_tiny import TinySpec
from glm_mlx.small import SMALL_MODEL
from glm_mlx.tokenizer import Tokenizer
from parity_tests.conftest import MakeModel
from parity_tests.fuzz import F32, I32, STRING, U32, File, array, string, value
from parity_tests.test_engine import damaged

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


def test_an_answer_cut_off_by_count_says_so_in_one_line(model: str, capfd: pytest.CaptureFixture[str]) -> None:
    """With --json too. Not one that ends by itself, nor a benchmark."""
    arguments = ["-m", model, "Hello", "--no-think", "--seed", "1", *never_stops(model)]
    line = "the answer is cut off: --count allows 12 tokens, reasoning included; raise it for more"
    for more, said in (
        ([*arguments, "-n", "12"], [line]),
        ([*arguments, "-n", "12", "--json"], [line]),
        ([*arguments, "--benchmark", "12"], []),
        (["What is 47 + 38?", "--temp", "0"], []),
    ):
        assert generate.main(more) == 0
        assert [text for text in capfd.readouterr().err.splitlines() if "cut off" in text] == said


def said(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Whatever the prompt, the model says this."""

    def generate(engine: Engine, *rest: object) -> Iterator[Step]:
        ids = Tokenizer(GGUFFile(SMALL_MODEL).metadata).encode(text, special=True)
        yield from (Step(token, 0.1, number) for number, token in enumerate(ids))

    monkeypatch.setattr(Engine, "generate", generate)


def test_calls_of_tools_are_printed_as_the_model_wrote_them(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On standard output with the answer, with --raw and with --json too."""
    call = "<tool_call>fish<arg_key>place</arg_key><arg_value>true</arg_value></tool_call>"
    said(monkeypatch, f"hm</think>I look.\n{call}{call}<|observation|>")
    assert generate.main(["Hello"]) == 0
    assert capfd.readouterr().out == f"I look.\n{call}{call}\n"
    assert report(capfd, "Hello")["text"] == f"I look.\n{call}{call}"
    assert generate.main(["--raw", "Hello<think>"]) == 0
    assert capfd.readouterr().out == f"I look.\n{call}{call}\n"


def test_logits_that_are_not_numbers_end_it_with_one_line(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below what was printed before; nothing that looks like JSON; a chat ends too."""
    arguments = ["Hello", "--raw", "--temp", "0", "-n", "20", *never_stops(model)]
    good = report(capfd, "-m", model, *arguments)
    ids = good["ids"]
    at = next(i for i in range(3, 20) if ids[i] not in ids[:i] and ids[i] not in good["prompt_ids"])
    broken = str(damaged(Path(model), tmp_path, "token_embd.weight", ids[at]))
    for more in ([], ["--json"]):
        assert generate.main(["-m", broken, *arguments, *more]) == 2
        out, err = capfd.readouterr()
        start = Tokenizer(GGUFFile(model).metadata).decode(ids[: at + 1]).lstrip("\r\n")
        assert out == ("" if more else f"{start}\n")
        assert re.fullmatch(r"error: the model's logits are not numbers .*; the file may be damaged.*\n", err)
    whole = str(damaged(Path(model), tmp_path, "output.weight", 0))
    done = run("-m", whole, "--chat", stdin=b"Hello\nHello\n")
    assert (done.returncode, done.stdout, done.stderr.count(b"not numbers")) == (2, b"", 1)


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
    tokenizer = Tokenizer(GGUFFile(model).metadata)
    assert json.loads(done.stdout)["prompt_ids"] == tokenizer.encode("a\udcff\udcfe\udc80b", special=True)


def test_a_line_of_a_chat_keeps_its_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), "utf-8"))
    lines = []
    command.run(lambda: lines.append(sys.stdin.readline()) or 0)
    assert lines == ["a\udcff\n"]


def test_a_prompt_that_has_not_ended_is_refused_and_not_cut(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Standard input may be non-blocking, and then says that it has nothing at present."""
    reader, writer = os.pipe()
    with open(reader, encoding="utf-8") as stdin, open(writer, "wb", buffering=0) as rest:
        os.set_blocking(reader, False)
        monkeypatch.setattr(sys, "stdin", stdin)
        for written in (b"", b"Hello"):
            rest.write(written)
            assert generate.main(["-m", model]) == 2
            assert re.fullmatch("error: standard input is non-blocking.*; .*\n", capfd.readouterr().err)
        assert generate.main(["-m", model, "--chat"]) == 2
        assert "error: standard input is non-blocking" in capfd.readouterr().err


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


def test_a_benchmark_survives_a_clock_that_stands_still(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    assert generate.main(["-m", model, "Hi", "--benchmark", "3", "--seed", "1"]) == 0
    assert len(re.findall(r"│ +\d+ │ +0\.00 │ +inf │", capfd.readouterr().err)) == 2


@pytest.mark.parametrize("count", [1 << 63, 1 << 64])
def test_a_count_beyond_every_machine_number_means_as_many_as_fit(
    count: int, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    got = report(capfd, "-m", model, "Hi", "-n", str(count), "--context", "30", *never_stops(model))
    assert len(got["prompt_ids"]) + len(got["ids"]) == 30
    capfd.readouterr()
    assert generate.main(["-m", model, "Hi", "--benchmark", str(count), "--context", "30"]) == 0


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
        (["x", "--count", "9" * 5000], "999..."),
        (["x", "--seed", str(1 << 64)], "seed is 18446744073709551616"),
        (["x", "--top-k", str(1 << 31)], "top-k is 2147483648"),
        (["x", "--json", "--logprobs", str(1 << 64)], "logprobs is 18446744073709551616"),
        (["x", "--context", str(1 << 64)], "context is 18,446,744,073,709,551,616"),
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
    assert len(lines[0]) < 300


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=str)
def test_a_hub_model_without_a_network_is_one_line(network: dict[str, str]) -> None:
    """Offline by wish, and by a connection that is refused."""
    done = run("--model", "owner/repo:Q4_0", "x", **network)
    assert done.returncode == 2
    *notes, error = done.stderr.decode().splitlines()
    assert error.startswith("error: cannot fetch owner/repo:Q4_0 from the hub")
    asked = "HF_HUB_OFFLINE" not in network
    assert notes == ["note: there is no such file here, so the hub is asked for owner/repo:Q4_0"] * asked


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
    assert re.search(
        rb"^note: the hub was not reached \(.*\); this is the copy of owner/repo of 20..-..-.., revision abc$",
        done.stderr,
        re.MULTILINE,
    )


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
        ("-h > /dev/full", 2, "error: cannot go on"),
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


@pytest.mark.parametrize("reader", ["has gone", "is a full disk"])
def test_standard_error_that_nobody_takes_costs_no_answer(reader: str) -> None:
    if reader == "has gone":
        end, stderr = os.pipe()
        os.close(end)
    else:
        stderr = os.open("/dev/full", os.O_WRONLY)
    arguments = ["What is 47 + 38?", "--temp", "0", "--benchmark", "60"]  # notes, reasoning, a table, figures
    done = subprocess.run([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, timeout=60)
    os.close(stderr)
    assert done.returncode == 0
    assert b"85" in done.stdout


TALKATIVE = """
import sys
from glm_mlx.command import run
run(lambda: print("ü" * 99999, "b", file=sys.stderr) or sys.stderr.write("c") and 0)
print("d", file=sys.stderr)
"""


def test_what_a_command_prints_reaches_standard_error_whole_and_in_order() -> None:
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", TALKATIVE], cwd=ROOT, capture_output=True, timeout=60)
    assert done.stderr.decode() == "ü" * 99999 + " b\ncd\n"


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
    line = f"set -o pipefail; {sys.executable} -m glm_mlx.generate -m {model} Hello --no-think -n 300 | head -c 5"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0
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
    assert re.fullmatch(r"error: a context of 1,001 tokens needs .*; --context \d{3} would fit\n", err)


def test_what_a_file_says_and_cannot_mean_is_said_once_and_it_runs(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Advice on sampling that is out of range is not blamed on an option, and options are taken beside it."""
    file = File.read(Path(model)).put("deepseek2.expert_gating_func", value(U32, 1))
    file.put("general.sampling.top_p", value(F32, 0.0)).put("general.sampling.top_k", value(I32, -1))
    path = file.write(tmp_path / "odd.gguf")
    assert generate.main(["-m", str(path), "Hi", "-n", "2", "--temperature", "0.5", "--json"]) == 0
    out, err = capfd.readouterr()
    assert re.findall("^note: (.{50})", err, re.MULTILINE) == [
        "deepseek2.expert_gating_func = 1 means softmax, bu",
        "the file advises general.sampling.top_p = 0.0, whi",
    ]
    used = json.loads(out)["sampling"]
    assert (used["top_p"], used["top_k"], used["temperature"]) == (0.95, 0, 0.5)


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


def test_sigterm_while_a_bar_shows_gives_the_cursor_back(model: str) -> None:
    text = "The cat runs over the house and the dog runs under it. " * 70
    arguments = ("-m", model, text, "-n", "4000", *never_stops(model))
    reading = Terminal(*arguments, command=(sys.executable, "-c", IMPATIENT))
    reading.wait_for(r"reading the prompt .* \d+/1\d{3}")
    os.kill(reading.process, signal.SIGTERM)
    reading.wait_for("never")
    assert reading.exit_code() == 128 + signal.SIGTERM
    assert -1 < reading.seen.rfind("\x1b[?25l") < reading.seen.rfind("\x1b[?25h"), "the cursor stays hidden"
    assert "Traceback" not in reading.seen


def test_sighup_at_the_prompt_of_a_chat_leaves_the_terminal_as_it_was(model: str) -> None:
    chat = Terminal("-m", model, "--chat")
    before = termios.tcgetattr(chat.end)
    chat.wait_for("> ")
    deadline = time.monotonic() + 10
    while termios.tcgetattr(chat.end) == before and time.monotonic() < deadline:  # the prompt is there a moment before
        time.sleep(0.01)
    assert termios.tcgetattr(chat.end) != before, "this is no readline"
    time.sleep(0.3)  # until readline waits
    os.kill(chat.process, signal.SIGHUP)
    chat.wait_for("never")
    assert termios.tcgetattr(chat.end) == before
    assert chat.exit_code() == 128 + signal.SIGHUP
    assert "Traceback" not in chat.seen


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("-m glm_mlx.generate", "signal"),
        ("-m glm_mlx.generate", "hashlib"),
        ("-m glm_mlx.generate", "argparse"),
        ("-m glm_mlx.generate Hi", "mlx"),
        ("-m glm_mlx.doctor", "mlx"),
        ("-m glm_mlx.make_tiny x.gguf", "numpy"),
        ("-m reference --model x.gguf", "argparse"),
        ("-m reference --model x.gguf", "numpy"),
        ("bench/decode.py x.gguf", "numpy"),
    ],
)
def test_ctrl_c_while_a_command_starts_prints_no_traceback(line: str, module: str, tmp_path: Path) -> None:
    """It comes in the midst of an import, before there is anything to clean up."""
    (tmp_path / f"{module}.py").write_text("import os\nos.kill(os.getpid(), 2)\nraise OSError\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, env=env, capture_output=True, timeout=60)
    assert done.stderr == b""
    assert done.returncode == -signal.SIGINT  # which a shell shows as 130


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_stopped_answers_with_the_code_of_a_shell(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def work() -> int:
        try:
            signal.raise_signal(number)
            return 0
        finally:
            cleaned.append(True)

    assert command.run(work) == 128 + number
    assert cleaned
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command.run(lambda: signal.raise_signal(signal.SIGHUP) or 7) == 7
    finally:
        signal.signal(signal.SIGHUP, before)
