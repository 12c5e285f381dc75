from __future__ import annotations

from pathlib import Path

import pytest

from strobe import settings
from strobe.errors import SettingsError


def test_default_then_environment_then_flag() -> None:
    assert settings.load({}).device == "auto"
    assert settings.load({"STROBE_DEVICE": "cpu"}).device == "cpu"
    assert settings.load({"STROBE_DEVICE": "cpu"}, device="cuda:1").device == "cuda:1"
    assert settings.load({"STROBE_DEVICE": "cpu"}, device=None).device == "cpu"


def test_rows_name_each_source() -> None:
    rows = settings.load({"STROBE_LOG_LEVEL": "Debug"}, device="cpu").rows()
    found = {row["variable"]: (row["value"], row["source"]) for row in rows}
    assert found["STROBE_LOG_LEVEL"] == ("debug", "STROBE_LOG_LEVEL")
    assert found["STROBE_DEVICE"] == ("cpu", "flag --device")
    assert found["STROBE_KERNEL"] == ("auto", "default")
    assert all(row["doc"] for row in rows)


def test_environment_is_read_at_each_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STROBE_KERNEL", "textbook")
    assert settings.load().kernel == "textbook"
    monkeypatch.delenv("STROBE_KERNEL")
    assert settings.load().kernel == "auto"


def test_cache_dir_follows_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert settings.load({}).cache_dir == Path("/somewhere/strobe")
    monkeypatch.setattr("sys.platform", "darwin")
    assert settings.load({}).cache_dir == Path.home() / "Library" / "Caches" / "strobe"
    assert settings.load({"STROBE_CACHE_DIR": "~/x"}).cache_dir == Path.home() / "x"


def test_misspelt_variable_is_named_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"STROBE_DEVCE.*did you mean 'STROBE_DEVICE'"):
        settings.load({"STROBE_DEVCE": "cpu"})


@pytest.mark.parametrize(
    ("variable", "value", "supported"),
    [
        ("STROBE_DEVICE", "gpu", "cuda:N"),
        ("STROBE_DEVICE", "cuda:", "cuda:N"),
        ("STROBE_DEVICE", "cuda:0; rm", "cuda:N"),
        ("STROBE_LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("STROBE_KERNEL", "../x", "strobe explain"),
        ("STROBE_LINEAR", "", "auto"),
        ("STROBE_CACHE_DIR", " ", "a folder"),
    ],
)
def test_bad_value_names_variable_and_what_is_supported(variable: str, value: str, supported: str) -> None:
    with pytest.raises(SettingsError) as raised:
        settings.load({variable: value})
    assert variable in str(raised.value)
    assert repr(value) in str(raised.value)
    assert supported in str(raised.value)


def test_the_home_of_nobody_is_no_folder() -> None:
    with pytest.raises(SettingsError, match="there is no such user"):
        settings.load({"STROBE_CACHE_DIR": "~no such user/cache"})


def test_bad_flag_is_named_as_a_flag() -> None:
    with pytest.raises(SettingsError, match=r"--device is 'tpu'"):
        settings.load({}, device="tpu")
