"""The commands that the README and the chapters print are understood by the program, word for word."""

import errno
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest
from test_book import BOOK, NOTEBOOKS, PAGES, prose

from cpvt import cli
from cpvt.config import RunConfig


def commands(page: Path) -> list[list[str]]:
    """The words behind `cpvt` in every fenced block; what stands before it, such as torchrun, is left out."""
    found = []
    for language, block in re.findall(r"^```(.*)\n((?:(?!```).*\n)*?)```$", prose(page), flags=re.M):
        for line in block.replace("\\\n", " ").splitlines() if not language else []:
            if call := re.search(r"(?:^|-m )cpvt (\w+ .*?)(?: &)?$", line):
                found.append(shlex.split(call[1], comments=True))
    return found


PRINTED = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:60]}")
    for page in [BOOK.parent / "README.md", *PAGES, *NOTEBOOKS]
    for words in commands(page)
]


def test_every_command_is_shown():
    assert len(PRINTED) > 12 and {words.values[0][0] for words in PRINTED} == set(cli.COMMANDS)


class Understood(Exception):
    """In place of what a command does."""


@pytest.mark.parametrize("words", PRINTED)
def test_a_printed_command_is_understood(words, monkeypatch, capsys):
    lab = (
        "lab.photographs.check_images",
        "lab.runner.run_missing",
        "lab.costs.measure_costs",
        "lab.benchmark.Benchmark.__call__",
    )
    for work in ("training.train.train", "training.checkpoint.load_saved", "data.pack.pack", *lab):
        monkeypatch.setattr(f"cpvt.{work}", mock.Mock(side_effect=Understood))
    with pytest.raises((Understood, SystemExit)) as end:
        cli.main(words)
        raise SystemExit  # it has listed something
    if end.type is SystemExit:
        lists = {"--help", "--list"} & set(words) or words == ["experiments"]
        assert not end.value.code and lists, capsys.readouterr().err


def test_photographs_without_their_images_are_refused_by_name(tmp_path, capsys):
    """A folder that has one class of a hundred; a table and a grid that there are not."""
    for split in ("train", "val"):
        (tmp_path / "tiny-imagenet-200" / split / "n01443537").mkdir(parents=True)
        (tmp_path / "tiny-imagenet-200" / split / "n01443537" / "0.JPEG").write_bytes(b"")
    asked = ["experiments", "photographs", "--root", str(tmp_path), "--out", str(tmp_path / "rows")]
    for more, words in (
        ([], "1 classes; expected the 100"),
        (["--only", "cores"], "core"),
        (["--grid", "9"], "8 or of 14"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*asked, *more])
        assert end.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()
    fetched = "torchvision.datasets.utils.download_and_extract_archive"
    with mock.patch(fetched, side_effect=OSError("no route")), pytest.raises(SystemExit):
        cli.main(["experiments", "photographs", "--root", str(tmp_path / "new"), "--out", str(tmp_path)])
    assert "fill" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_stopped_run_asks_to_be_called_again(monkeypatch, capsys):
    run = mock.Mock(interrupted="SIGTERM", steps=3)
    monkeypatch.setattr("cpvt.training.train.train", lambda *_, **__: run)
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--data", "where"])
    assert end.value.code == 75 and "after step 3" in capsys.readouterr().out


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    with mock.patch("cpvt.training.train.train", side_effect=Understood) as work, pytest.raises(Understood):
        cli.main(["train", "--data=~/x", "--run.out", "~/y~", "--distill.weights=~", "--distill.teacher=x"])
    config = work.call_args.args[0]
    assert (config.data.name, config.run.out, config.distill.weights) == ("/h/x", "/h/y~", "/h")
    assert RunConfig(out="~/y", init="~").out == "/h/y" and not RunConfig().out
    with mock.patch("cpvt.data.pack.pack", side_effect=Understood) as work, pytest.raises(Understood):
        cli.main(["pack", "~/a", "b"])
    assert work.call_args.kwargs["source"] == Path("/h/a")


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (ValueError("of somewhere deep inside"), False),
        (OSError("the disk is gone"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset by a worker"), False),
        (OSError(errno.ENOSPC, "no space"), True),
        (PermissionError(errno.EACCES, "not allowed", "/mine"), True),
    ],
    ids=["value", "disk", "connection", "full disk", "path"],
)
def test_only_a_path_or_a_full_disk_is_refused_without_a_traceback(error, refused, monkeypatch, capsys):
    """Anything else, hours into a run, is a fault of ours."""
    monkeypatch.setattr("cpvt.data.pack.pack", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit if refused else type(error)) as end:
        cli.main(["pack", "DOWNLOADS", "imagenet"])
    if refused:
        assert end.value.code == 2 and (error.filename or "no space") in capsys.readouterr().err
