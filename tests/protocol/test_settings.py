"""Settings: what is refused at the edge, before anything is made or started."""

from pathlib import Path

import pytest

from protocol.errors import ConfigurationError
from protocol.settings import EngineSettings, Settings, load_settings

NUMBERS = {
    "num_engines": "0",
    "chunk_requests": "0",
    "chunk_bytes": "-1",
    "lease_seconds": "0",
    "intake_tokens": "0",
    "answers_ttl_seconds": "0",
    "answers_max_bytes": "-1",
    "engine_start_seconds": "0",
    "engine_max_model_len": "1",
    "engine_kv_tokens": "0",
    "engine_memory_fraction": "1.5",
    "engine_max_batch_tokens": "0",
    "engine_max_num_seqs": "0",
    "engine_lookahead": "2",
    "engine_num_threads": "0",
}


@pytest.mark.parametrize(("name", "text"), NUMBERS.items())
def test_number_out_of_range_is_refused_with_its_limits(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is out of range: it must be from [0-9.]+ to [0-9,]+$") as caught:
        load_settings(environ={f"MILLRACE_{name.upper()}": text})

    start_of_message = name.replace("engine_", "engine.") if name != "engine_start_seconds" else name
    assert str(caught.value).startswith(f"{start_of_message}={text}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lease_seconds", "lease_seconds='soon' has the wrong type: it must be a number"),
        ("engine_max_num_seqs", "engine.max_num_seqs='soon' has the wrong type: it must be a whole number"),
        ("engine_admission", "engine.admission='soon' is unknown: it is one of auto, headroom, peak"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ={f"MILLRACE_{name.upper()}": "soon"})

    assert str(caught.value) == message


def test_a_secret_of_the_wrong_type_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "millrace.toml").write_text("flower_password = 12345")
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environ={"MILLRACE_CONFIG": str(tmp_path / "millrace.toml")})

    assert str(caught.value) == "flower_password has the wrong type: it must be a text"


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e300"])
@pytest.mark.parametrize(
    "name", ["lease_seconds", "answers_ttl_seconds", "engine_start_seconds", "engine_memory_fraction"]
)
def test_numbers_that_no_clock_could_count_are_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigurationError, match="is out of range"):
        load_settings(environ={f"MILLRACE_{name.upper()}": text})


def test_every_number_has_limits() -> None:
    from protocol.settings import LIMITS

    numbers = {
        prefix + name
        for prefix, struct in (("", Settings), ("engine.", EngineSettings))
        for name, kind in struct.__annotations__.items()
        if {"int", "float"} & set(str(getattr(kind, "__name__", kind)).replace("|", " ").split())
    }
    assert numbers == set(LIMITS)


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [
        ("log_level", "loud", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("engine_dtype", "int4", "auto, float32, bfloat16, float16"),
        ("engine_layout", "round", "auto, packed, padded"),
        ("engine_attention", "flash", "auto, sdpa, sparse, flash-attn-2, triton"),
        ("engine_device", "gpu", "auto, cpu, cuda or cuda:N"),
    ],
)
def test_unknown_choice_is_refused_with_those_there_are(name: str, value: str, known: str) -> None:
    with pytest.raises(ConfigurationError, match=f"={value!r} is unknown: it is .*{known}"):
        load_settings(environ={f"MILLRACE_{name.upper()}": value})


def test_names_served_besides_come_with_commas_between_them_and_survive_the_way_to_a_child(tmp_path: Path) -> None:
    from worker.local.system import settings_environ

    settings = load_settings(environ={"MILLRACE_ALSO_SERVES": "b, a,,tiny", "MILLRACE_MODEL_NAME": "tiny"})

    assert settings.served_models == ("tiny", "b", "a")
    assert load_settings(environ=settings_environ(settings)) == settings
    (tmp_path / "millrace.toml").write_text('also_serves = ["a,b"]')
    with pytest.raises(ConfigurationError, match=r"also_serves has 'a,b': a name has .* no comma"):
        load_settings(environ={"MILLRACE_CONFIG": str(tmp_path / "millrace.toml")})


@pytest.mark.parametrize("environ", [{}, {"MILLRACE_ENGINE_MODEL": "m"}])
def test_tables_own_name_is_no_variable(environ: dict[str, str]) -> None:
    for variables in ({"MILLRACE_ENGINE": "foo", **environ}, {**environ, "MILLRACE_ENGINE": "foo"}):
        with pytest.raises(ConfigurationError, match=r"MILLRACE_ENGINE sets 'engine', which is a table"):
            load_settings(environ=variables)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:secret@localhost:99999/0",
        "redis://:se/cret@localhost:6379/0",
        "redis://:p@localhost:6379/secret",
        "redis://[::1",
        "amqp://h",
        "h",
    ],
)
def test_broker_url_that_leads_nowhere_is_refused_without_telling_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="broker_url") as caught:
        load_settings(environ={"MILLRACE_BROKER_URL": url})

    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "rediss://:p@h:6380/1?ssl_cert_reqs=required",
        "redis+socket:///tmp/redis.sock",
        "redis://[::1]:6379/0",
    ],
)
def test_broker_urls_of_redis_are_taken(url: str) -> None:
    assert load_settings(environ={"MILLRACE_BROKER_URL": url}).broker_url == url


def test_values_at_their_limits_are_taken() -> None:
    settings = load_settings(
        environ={"MILLRACE_CHUNK_REQUESTS": "1", "MILLRACE_ENGINE_MEMORY_FRACTION": "1", "MILLRACE_NUM_ENGINES": "1"}
    )

    assert (settings.chunk_requests, settings.engine.memory_fraction, settings.num_engines) == (1, 1.0, 1)


def test_settings_made_in_python_are_checked_too() -> None:
    with pytest.raises(ConfigurationError, match="chunk_requests=0 is out of range"):
        Settings(chunk_requests=0).check_topology()
