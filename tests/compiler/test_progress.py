import pytest

from fourfold.compiler.progress import shown


def test_progress_hands_steps_on_and_stays_off_a_log(capsys):
    for silent in (True, False):
        with shown(silent) as progress:
            assert list(progress(range(3), "steps", 3)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with shown(silent=False) as progress:
        assert list(progress(iter("ab"), "letters", 2)) == ["a", "b"]
        with pytest.raises(KeyError):
            for _ in progress("ab", "letters", 2):
                raise KeyError
    assert capsys.readouterr().out == ""
