from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

import vattention
from vattention.cli.main import USER_ERROR, main

SOURCE = Path(__file__).parent.parent.parent / "src"


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in ("serve", "generate", "chat", "bench", "info"):
        assert command in shown


@pytest.mark.parametrize("command", ["serve", "generate", "chat", "bench throughput"])
def test_help_of_a_command_has_the_engines_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "MODEL" in shown
    for option in ("--max-num-seqs", "--kv-memory", "--dtype", "--trust-remote-code"):
        assert option in shown
    assert "number of slots" in shown
    assert ("--temperature" in shown) == (command in {"generate", "chat"})


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == vattention.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sing"], "sing"),
        (["generate"], "MODEL"),
        (["generate", "demo", "--max-tokens", "many", "x"], "--max-tokens"),
        (["generate", "demo", "--dtype", "int3", "x"], "bfloat16"),
        (["generate", "demo", "--max-num-seqs", "0", "x"], "max_num_seqs must be at least 1"),
        (["generate", "demo", "--top-p", "7", "x"], "top_p must be"),
        (["generate", "demo"], "--input"),
        (["generate", "demo", "--input", "/no/such/file"], "cannot read /no/such/file: No such file"),
        (["chat", "demo", "--skip-tokenizer-init"], "--skip-tokenizer-init"),
        (["bench", "throughput", "demo", "--requests", "/no/such/file"], "/no/such/file"),
        (["bench", "throughput", "demo"], "--requests"),
    ],
)
def test_a_users_error_is_one_line_and_a_status(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == USER_ERROR
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vattention: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vattention.cli.info.collect", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_control_c_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vattention.cli.info.collect", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == ""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [[], ["generate"], ["serve"], ["bench", "throughput"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys; from vattention.cli.main import main; "
        f"main([*{arguments!r}, '--help']); "
        "heavy = {'torch', 'numpy', 'transformers', 'fastapi', 'uvicorn'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr


def test_help_is_there_at_once() -> None:
    def processor_time_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert python(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Beside what the parser alone takes, in turns, and the best of three: a busy machine slows both.
    runs = [
        (processor_time_s("-m", "vattention", "--help"), processor_time_s("-c", "import cyclopts"))
        for _ in range(3)
    ]
    assert min(ours for ours, _ in runs) < 3 * min(parsers for _, parsers in runs)


def test_the_module_runs_and_hands_on_the_status() -> None:
    done = python("-m", "vattention", "generate")
    assert done.returncode == USER_ERROR
    assert done.stderr.startswith("vattention: ")
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = (
        f"{sys.executable} -c 'from vattention.cli.main import main; raise SystemExit(main([\"info\"]))' | true"
    )
    done = subprocess.run(
        ["bash", "-c", f"{script}; exit ${{PIPESTATUS[0]}}"],
        env={"PYTHONPATH": str(SOURCE), "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in {0, 141}
    assert done.stderr == ""
