"""Where each setting of the coordinator comes from, and what is said of a wrong one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.config import CONFIG_NAME, load_config


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("CBTM_")]:
        monkeypatch.delenv(name)


def test_a_flag_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CONFIG_NAME).write_text("port = 1\nhttp_port = 2\nthreads = 3\n")
    monkeypatch.setenv("CBTM_PORT", "10")
    monkeypatch.setenv("CBTM_HTTP_PORT", "20")
    config = load_config(data_dir=tmp_path, port=100, http_port=None)
    assert (config.port, config.http_port, config.threads) == (100, 20, 3)
    assert config.reaper_seconds == 2.0


def test_the_file_is_found_by_the_folder_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / CONFIG_NAME).write_text("public_catalog = false\n")
    monkeypatch.setenv("CBTM_DATA_DIR", str(tmp_path))
    assert load_config().public_catalog is False


def test_other_variables_of_cbtm_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CBTM_TOKEN", "CBTM_COORDINATOR", "CBTM_FAULTS", "CBTM_DEBUG"):
        monkeypatch.setenv(name, "x")
    load_config(data_dir=tmp_path)


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({"port": -1}, "port"),
        ({"http_port": 65_536}, "http_port"),
        ({"host": ""}, "host"),
        ({"threads": 1}, "threads"),
        ({"reaper_seconds": 0}, "reaper_seconds"),
        ({"drain_seconds": float("inf")}, "drain_seconds"),
        ({"url_ttl_seconds": float("nan")}, "url_ttl_seconds"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_a_wrong_setting_is_named_with_its_sources(tmp_path: Path, flags: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: .*CBTM_{field.upper()}") as caught:
        load_config(data_dir=tmp_path, **flags)
    assert caught.value.field == field


def test_a_field_of_the_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text("prot = 1\n")
    with pytest.raises(InvalidArgument, match=f"^prot: .*{CONFIG_NAME}"):
        load_config(data_dir=tmp_path)


def test_a_file_that_is_not_toml_says_so(tmp_path: Path) -> None:
    (tmp_path / CONFIG_NAME).write_text("port = \n")
    with pytest.raises(InvalidArgument, match=CONFIG_NAME):
        load_config(data_dir=tmp_path)


def test_registry_and_objects_lie_in_the_data_folder_unless_told_otherwise(tmp_path: Path) -> None:
    config = load_config(data_dir=tmp_path)
    assert config.registry_url == f"sqlite:///{tmp_path}/registry.db"
    assert config.storage_location == f"local:{tmp_path}/objects"
    elsewhere = load_config(data_dir=tmp_path, database_url="postgresql://a/b", object_store="s3://bucket/prefix")
    assert elsewhere.registry_url == "postgresql://a/b"
    assert elsewhere.storage_location == "s3://bucket/prefix"


def test_a_configuration_is_frozen(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(data_dir=tmp_path).port = 1
