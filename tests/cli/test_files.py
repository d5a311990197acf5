from __future__ import annotations

from pathlib import Path

import pytest

from vattention.cli.files import open_output, read_lines, read_text
from vattention.errors import ConfigError


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("a\u2028b\n\nc\x0bd\n", encoding="utf-8")
    assert read_lines(path) == ["a\u2028b", "", "c\x0bd"]


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match="latin: it is not UTF-8"):
        read_text(tmp_path / "latin")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_text(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot write .*No such file"):
        open_output(tmp_path / "none" / "file")
