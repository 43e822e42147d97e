"""README.md: its commands run in a shell, against the configuration that is shipped, and answer as shown."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.servers import ROOT, serve, shipped

TEXT = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
VARYING = [
    (r'"(?:[A-Za-z0-9]{64}|VZrQ\.\.\.)"', "TOKEN"),
    (r'"[0-9a-f]{24}"', "ID"),
    (r"\b\d{10}\b", "TIME"),
    (r"curl/[\d.]+", "curl"),
    (r'"current":\w+', "CURRENT"),  # two logins within one second may be listed either way
]


def shown() -> list[tuple[str, str]]:
    """Return all commands, each with the output below it."""
    blocks = re.findall(r"^```console\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return [found for block in blocks for found in COMMAND.findall(block)]


def pool() -> str:
    """Return the table of the pool."""
    (block,) = re.findall(r"^```toml\n(\[pools\..*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    return str(block)


def alike(text: str) -> str:
    """Replace what differs from run to run, and join lines."""
    for pattern, word in VARYING:
        text = re.sub(pattern, word, text)
    return text.replace("\n", "").partition("...")[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_each_command_answers_as_shown(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(f"{shipped()}\n{pool()}")
    lines = []
    for number, (command, _) in enumerate(shown()):
        if "POST" in command:  # the tour has logged out; the reader is told to log in again
            lines.append(shown()[1][0])
        lines.append(f"{{ {command}\n}} > {number}")
        if "POST" in command:
            lines.append(f"LEASE=$(cut -d'\"' -f4 {number})")
    with serve(tmp_path / "config.toml") as server:
        script = "\n".join(lines).replace("localhost:8000", server.url).replace("VZrQ...", "$LEASE")
        subprocess.run(["bash", "-euc", script], cwd=tmp_path, check=True, timeout=60, capture_output=True)
    outputs = [output for _, output in shown()]
    answers = [(tmp_path / str(number)).read_text() for number in range(len(outputs))]
    assert len(outputs) == 12
    for answer, output in zip(answers, outputs, strict=True):
        assert alike(answer)[: len(alike(output))] == alike(output)
    assert [answers[number] for number in (1, 11)] == ["", ""]
