"""The settings: valid values, defaults, derived values, and errors in one line."""

from __future__ import annotations

import json
import pwd
import re
from pathlib import Path
from typing import NoReturn

import pytest

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import BUNDLED_MODEL, ModelSpec
from emb_model_provider.settings import FIDELITY_FLOORS, PREFIX, Settings
from emb_model_provider.settings.loading import load_settings, overridden_names

GUIDE = Path(__file__).parents[1] / "data" / "guide.env.md"
NO_FILE = Path("/nonexistent/.env")


def load(**variables: str) -> Settings:
    """Read settings from variables, which get the prefix unless their name starts with an underscore."""
    environ = {name[1:] if name.startswith("_") else PREFIX + name: value for name, value in variables.items()}
    settings, warnings = load_settings(NO_FILE, environ)
    assert warnings == []
    return settings


def specs(**variables: str) -> dict[str, ModelSpec]:
    return {spec.alias: spec for spec in load(**variables).served_models().specs}


def error_of(**variables: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(**variables)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- the guide ----------------------------------------------------------------------------------------

GUIDE_BLOCKS = re.findall(r"```env\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", GUIDE_BLOCKS)
def test_env_blocks_of_the_guide_are_valid(block: str, tmp_path: Path) -> None:
    """Each block, including multi-line JSON, is read without an error or a warning."""
    (tmp_path / ".env").write_text(block, encoding="utf-8")
    settings, warnings = load_settings(tmp_path / ".env", {})
    assert warnings == []
    names = re.findall(r"^EMB_PROVIDER_(\w+)=(?=\S)", block, re.MULTILINE)
    groups = (getattr(settings, group) for group in Settings.groups())
    assert {name.lower() for name in names} == {name for group in groups for name in group.model_fields_set}


def test_guide_is_complete() -> None:
    """It has seven blocks, two of them with a mapping over several lines."""
    assert len(GUIDE_BLOCKS) == 7
    assert sum("MODEL_MAPPING={\n" in block for block in GUIDE_BLOCKS) == 2


def test_mapping_of_the_guide(tmp_path: Path) -> None:
    """Names, hubs and precisions are read in order, and all models are preloaded."""
    block = next(block for block in GUIDE_BLOCKS if '"gte-chinese"' in block)
    (tmp_path / ".env").write_text(block, encoding="utf-8")
    models = load_settings(tmp_path / ".env", {})[0].served_models()
    assert [(s.alias, s.name, s.source, s.precision) for s in models.specs] == [
        ("gte-chinese", "damo/nlp_gte_sentence-embedding_chinese-base", "modelscope", "fp16"),
        ("gte-english", "sentence-transformers/all-MiniLM-L12-v2", "huggingface", "fp16"),
        ("multilingual", "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2", "huggingface", "fp32"),
    ]
    assert models.preload == ("gte-chinese", "gte-english", "multilingual")


# --- models -------------------------------------------------------------------------------------------


def test_bundled_model_is_the_default() -> None:
    """Without settings, the bundled model is served on port 9000."""
    models = load().served_models()
    assert [(s.alias, s.source) for s in models.specs] == [(BUNDLED_MODEL, "bundled")]
    assert load().server.port == 9000


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({"_MODEL_HUB": "modelscope"}, "modelscope"),
        ({"_MODEL_HUB": "huggingface"}, "huggingface"),
        ({"_USE_MODELSCOPE": "True"}, "modelscope"),
        ({"_USE_MODELSCOPE": "false"}, "huggingface"),
        ({"_MODEL_HUB": "modelscope", "MODEL_SOURCE": "huggingface"}, "huggingface"),
        ({}, "auto"),
    ],
)
def test_older_names_set_the_default_hub(variables: dict[str, str], source: str) -> None:
    """MODEL_HUB and USE_MODELSCOPE are read if MODEL_SOURCE is unset."""
    assert specs(MODEL_NAME="owner/name", **variables)["owner/name"].source == source


def test_older_names_do_not_affect_the_bundled_model() -> None:
    """MODEL_HUB does not cause the bundled model to be downloaded."""
    assert specs(_MODEL_HUB="modelscope")[BUNDLED_MODEL].source == "bundled"


def test_one_directory_can_be_the_cache_of_both_hubs() -> None:
    """MODEL_CACHE_DIR is the cache of both hubs, unless a variable of a hub overrides it."""
    both = load(_MODEL_CACHE_DIR="/models").hubs
    assert (both.modelscope_cache_dir, both.hf_cache_dir) == (Path("/models"), Path("/models"))
    one = load(_MODEL_CACHE_DIR="/models", _MODELSCOPE_CACHE="/ms", HF_CACHE_DIR="/hf").hubs
    assert (one.modelscope_cache_dir, one.hf_cache_dir) == (Path("/ms"), Path("/hf"))


def test_model_can_have_another_name_on_a_hub() -> None:
    """HUB_NAMES maps names by hub. Other names and hubs are not affected."""
    hubs = load(HUB_NAMES='{"a/b": {"modelscope": "c/d"}}').hubs
    assert hubs.name_on("modelscope", "a/b") == "c/d"
    assert hubs.name_on("huggingface", "a/b") == "a/b"
    assert hubs.name_on("modelscope", "e/f") == "e/f"
    with pytest.raises(SettingsError, match=r'EMB_PROVIDER_HUB_NAMES=.*must be JSON like {"acme/model"'):
        load(HUB_NAMES='{"a/b": {"github": "c/d"}}')


def test_limits_of_loaded_models() -> None:
    """Sizes have units. At most MAX_LOADED_MODELS models are preloaded, and naming more is an error."""
    mapping = '{"a": {"name": "x"}, "b": {"name": "y"}}'
    settings = load(MODEL_MEMORY_LIMIT="1.5GiB", MAX_LOADED_MODELS="1", MODEL_MAPPING=mapping, LOAD_WAIT_S="0")
    memory = settings.memory
    assert memory.model_memory_limit == 3 * 2**29
    assert (memory.max_loaded_models, memory.load_wait_s, memory.idle_unload_s) == (1, 0, None)
    assert settings.served_models().preload == ("a",)
    with pytest.raises(
        SettingsError, match="PRELOAD_MODELS=a,b: must not be more than EMB_PROVIDER_MAX_LOADED_MODELS=1"
    ):
        load(MAX_LOADED_MODELS="1", MODEL_MAPPING=mapping, PRELOAD_MODELS="a,b")
    with pytest.raises(SettingsError, match="MODEL_MEMORY_LIMIT=much: must be bytes, or a size like 4GB"):
        load(MODEL_MEMORY_LIMIT="much")


def test_mapping_entry_inherits_the_settings() -> None:
    """Device, precision, hub and backend are inherited, unless the entry sets them."""
    models = specs(
        MODEL_MAPPING='{"a": {"name": "x"}, "b": {"name": "y", "device": "cuda:1", "precision": "BF16"}}',
        DEVICE="cpu", MODEL_PRECISION="fp16", MODEL_SOURCE="modelscope",
    )  # fmt: skip
    assert (models["a"].device, models["a"].precision, models["a"].source) == ("cpu", "fp16", "modelscope")
    assert (models["b"].device, models["b"].precision) == ("cuda:1", "bf16")


def test_mapping_entry_accepts_every_key() -> None:
    """All properties of a model can be set per model. Its token is not shown."""
    entry = """{"m": {"name": "o/n", "source": "modelscope", "precision": "fp32", "revision": "v1", "path": "/m",
      "device": "cpu", "backend": "torch", "pooling": "last", "normalize": true, "max_length": 128,
      "trust_remote_code": true, "prompts": {"query": "q: "}, "token_input": "model", "truncate": "none",
      "dimensions": [64, 128], "endpoint": "https://mirror.example", "token": "hush", "cache_dir": "/c"}}"""
    spec = specs(MODEL_MAPPING=entry)["m"]
    assert (spec.pooling, spec.normalize, spec.max_length, spec.truncate) == ("lasttoken", True, 128, "NONE")
    assert (spec.path, spec.cache_dir, spec.dimensions) == (Path("/m"), Path("/c"), (64, 128))
    assert (spec.revision, spec.endpoint, spec.token_input) == ("v1", "https://mirror.example", "model")
    assert spec.token == "hush"
    assert "hush" not in repr(spec)


def test_name_and_mapping_are_both_served() -> None:
    """MODEL_NAME comes first and is the default model."""
    models = load(MODEL_NAME="o/main", MODEL_MAPPING='{"a": {"name": "x"}}', PRELOAD_MODELS="a").served_models()
    assert [spec.alias for spec in models.specs] == ["o/main", "a"]
    assert models.preload == ("a",)
    assert load(PRELOAD_MODELS="none").served_models().preload == ()


def test_path_without_a_name_uses_the_name_of_the_directory(tmp_path: Path) -> None:
    """MODEL_PATH does not need MODEL_NAME."""
    (tmp_path / "my-model").mkdir()
    assert list(specs(MODEL_PATH=str(tmp_path / "my-model"))) == ["my-model"]


def test_names_can_be_urls_of_hubs() -> None:
    """In MODEL_NAME and in the mapping. A URL that contradicts the source is an error."""
    url = "https://www.modelscope.cn/models/iic/gte/tree/v1"
    main = specs(MODEL_NAME=url)["iic/gte"]
    assert (main.name, main.source, main.revision) == ("iic/gte", "modelscope", "v1")
    mapped = specs(MODEL_MAPPING=f'{{"m": {{"name": "{url}"}}}}')["m"]
    assert (mapped.name, mapped.source, mapped.revision) == ("iic/gte", "modelscope", "v1")
    assert "contradicts EMB_PROVIDER_MODEL_SOURCE=huggingface" in error_of(MODEL_NAME=url, MODEL_SOURCE="huggingface")
    entry = f'{{"m": {{"name": "{url}", "revision": "v2"}}}}'
    assert "contradicts revision 'v2': remove one" in error_of(MODEL_MAPPING=entry)
    assert "not the URL of a model" in error_of(MODEL_NAME="https://example.com/a/b")


def test_quantization_is_requested_by_precision_or_switch() -> None:
    """ENABLE_QUANTIZATION=true with precision auto means int8. int8 does not need it."""
    assert specs(ENABLE_QUANTIZATION="true")[BUNDLED_MODEL].precision == "int8"
    assert specs(ENABLE_QUANTIZATION="true", MODEL_PRECISION="fp16")[BUNDLED_MODEL].precision == "fp16"
    assert specs(MODEL_PRECISION="int4")[BUNDLED_MODEL].precision == "int4"
    assert specs(ENABLE_QUANTIZATION="false")[BUNDLED_MODEL].precision == "auto"


# --- variables of the hubs -----------------------------------------------------------------------------


def test_variables_of_the_hubs_are_read() -> None:
    """Variables of the hub clients are read. Variables with our prefix take precedence."""
    hubs = load(
        _MODELSCOPE_CACHE="/ms", _MODELSCOPE_API_TOKEN="t1", _MODELSCOPE_DOMAIN="ms.example", _HF_HOME="/hf",
        _HF_ENDPOINT="https://mirror.example", _HF_TOKEN="t2", _HF_HUB_OFFLINE="1",
    ).hubs  # fmt: skip
    assert (hubs.modelscope_cache_dir, hubs.modelscope_endpoint) == (Path("/ms"), "https://ms.example")
    assert (hubs.hf_cache_dir, hubs.hf_endpoint, hubs.offline) == (Path("/hf/hub"), "https://mirror.example", True)
    assert (hubs.token("modelscope"), hubs.token("huggingface")) == ("t1", "t2")
    own = load(_HF_TOKEN="other", HF_TOKEN="own", _HF_HUB_CACHE="/a", _HF_HOME="/b").hubs
    assert (own.token("huggingface"), own.hf_cache_dir) == ("own", Path("/a"))


def test_secrets_are_not_shown() -> None:
    """Printing settings or a group of them shows no token and no key."""
    settings = load(HF_TOKEN="hush-1", MODELSCOPE_TOKEN="hush-2", API_KEYS="hush-3,hush-4")
    shown = repr(settings) + str(settings.model_dump()) + repr(settings.hubs) + repr(settings.server)
    assert "hush" not in shown
    assert settings.server.accepted_keys == ("hush-3", "hush-4")


# --- the other groups ---------------------------------------------------------------------------------


def test_sizes_are_converted_to_bytes() -> None:
    """Settings in MB and GB have properties in bytes."""
    settings = load(MAX_BODY_MB="0.5", MAX_ARTIFACTS_GB="1.5")
    assert settings.limits.max_body_bytes == 500_000
    assert settings.hubs.max_artifact_bytes == 1_500_000_000


def test_host_headers_are_checked_on_loopback() -> None:
    """On other addresses any Host is accepted, unless ALLOWED_HOSTS is set."""
    for host in ("localhost", "127.0.0.1", "127.0.0.2", "[::1]", "localhost,127.0.0.1"):
        assert load(HOST=host).server.checks_hosts
    for host in ("0.0.0.0", "::", "*", "localhost,10.0.0.1"):
        assert not load(HOST=host).server.checks_hosts
        assert load(HOST=host, ALLOWED_HOSTS="a.example").server.checks_hosts
    assert not load(ALLOWED_HOSTS="*").server.checks_hosts
    allowed = load(ALLOWED_HOSTS="A.example., b.example:80, ::1, [fd00::0]:1").server.accepted_hosts
    assert allowed == {"a.example", "b.example", "::1", "fd00::"}


def test_required_models() -> None:
    """By default those that are loaded at startup are required. Any alias of a model names it."""
    mapping = json.dumps({"a": {"name": "o/a", "aliases": ["b"]}, "c": {"name": "o/c"}})
    assert load(MODEL_MAPPING=mapping).served_models().required is None
    assert load(MODEL_MAPPING=mapping, REQUIRED_MODELS="b").served_models().required == ("a",)
    assert load(MODEL_MAPPING=mapping, REQUIRED_MODELS="none").served_models().required == ()
    assert "EMB_PROVIDER_REQUIRED_MODELS=d: must be one of a, b, c, or none" in error_of(
        MODEL_MAPPING=mapping, REQUIRED_MODELS="d"
    )


def test_floors_that_are_not_set_keep_their_default() -> None:
    """Setting one floor does not change the others. Measuring is on by default."""
    assert load().fidelity.floors == FIDELITY_FLOORS
    assert load().fidelity.measure_fidelity is True
    policy = load(FIDELITY_FLOORS='{"int8": 0.5, "fp32": 0}', MEASURE_FIDELITY="false").fidelity
    assert policy.floors == {**FIDELITY_FLOORS, "int8": 0.5, "fp32": 0.0}
    assert policy.measure_fidelity is False


# --- errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("PORT", "abc", "must be 1 to 65535"),
        ("PORT", "0", "must be 1 to 65535"),
        ("MODEL_PRECISION", "int3", "must be one of auto, fp32, fp16, bf16, int8, int4"),
        ("MODEL_SOURCE", "github", "must be one of auto, huggingface, modelscope, local, bundled"),
        ("DEVICE", "tpu", "must be one of auto, cpu, cuda, cuda:N, mps"),
        ("LOG_LEVEL", "loud", "must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("ENABLE_DYNAMIC_BATCHING", "maybe", "must be one of true, false"),
        ("MAX_BATCH_SIZE", "0", "must be 1 or more"),
        ("MAX_BODY_MB", "nan", "must be more than 0"),
        ("REQUEST_TIMEOUT_S", "inf", "must be more than 0"),
        ("MIN_BATCH_SIZE", "65", "must not be more than EMB_PROVIDER_MAX_BATCH_SIZE=64"),
        ("ALLOWED_HOSTS", "https://b.example", "must be host names separated by commas"),
        ("HOST", ",", "must be names or addresses separated by commas"),
        ("PRELOAD_MODELS", "x", f"must be one of {BUNDLED_MODEL}, or none"),
    ],
)
def test_invalid_value_is_reported_in_one_line(name: str, value: str, allowed: str) -> None:
    """The line names the variable, the value and the allowed values."""
    message = error_of(**{name: value})
    assert message.startswith(f"EMB_PROVIDER_{name}={value}: ")
    assert allowed in message


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ('{"a": {}}', "'a' lacks \"name\""),
        ('{"a": {"name": "x", "sorce": "local"}}', "'a' has no key 'sorce': must be one of name, source"),
        ('{"a": {"name": "x", "source": "github"}}', "a.source: must be one of auto, huggingface"),
        ('{"a": {"name": "x", "max_length": 0}}', "a.max_length: must be 1 or more."),
        ('{"a": {"name": "x", "dimensions": []}}', 'a.dimensions: must be a list of sizes, or "any".'),
        ('{"a": {"name": "x", "device": "tpu"}}', "a.device: must be one of auto, cpu, cuda, cuda:N, mps."),
        ('{"a": "x"}', "a: must be an object"),
        ('["a"]', "must be a JSON object"),
        ('{"a": {"name": "x"}, "a": {"name": "y"}}', "contains 'a' more than once"),
        ('{" a": {"name": "x"}}', "not a valid alias"),
        ('{"a": {"name": "x", "aliases": ["b\\n"]}}', "not a valid alias"),
        ('{"a": {"name": "x", "aliases": ["b"]}, "b": {"name": "y"}}', "b is also an alias"),
        ('{"a\\nb": {"name": "x"}}', "not a valid alias"),
        ('{"a": {"name": ', "not valid JSON, line 1"),
    ],
)
def test_error_in_the_mapping_is_located(mapping: str, message: str) -> None:
    """The line names the alias, the key and the allowed values."""
    line = error_of(MODEL_MAPPING=mapping)
    assert line.startswith("EMB_PROVIDER_MODEL_MAPPING")
    assert message in line


@pytest.mark.parametrize(
    "floors", ['{"int9": 0.5}', '{"auto": 0.99}', '{"int8": 1.01}', '{"int8": -0.1}', '{"int8": NaN}', '{"int8": "x"}']
)
def test_floor_of_an_unknown_precision_or_out_of_range_is_rejected(floors: str) -> None:
    """The line names the allowed precisions and the range."""
    assert error_of(FIDELITY_FLOORS=floors) == (
        f"EMB_PROVIDER_FIDELITY_FLOORS={floors}: must be JSON from a precision (fp32, bf16, fp16, int8 or int4) "
        'to 0 to 1, like {"int8": 0.99}.'
    )


@pytest.mark.parametrize(
    ("floors", "message"),
    [
        ("0.99", 'must be a JSON object like {"int8": 0.99}'),
        ('{"int8": 0.9', "is not valid JSON, line 1"),
        ('{"int8": 0.9, "int8": 0.8}', "contains 'int8' more than once"),
    ],
)
def test_floors_that_are_not_an_object_are_rejected(floors: str, message: str) -> None:
    """A single number, a missing bracket and a duplicate precision are reported."""
    line = error_of(FIDELITY_FLOORS=floors)
    assert line.startswith("EMB_PROVIDER_FIDELITY_FLOORS")
    assert message in line


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantization_switch_must_not_contradict_the_precision(precision: str) -> None:
    """The line names both settings, for the main model and for a mapped one."""
    assert f"EMB_PROVIDER_MODEL_PRECISION={precision}" in error_of(
        ENABLE_QUANTIZATION="false", MODEL_PRECISION=precision
    )
    mapping = f'{{"a": {{"name": "x", "precision": "{precision}"}}}}'
    assert f"the precision of 'a' in EMB_PROVIDER_MODEL_MAPPING={precision}" in error_of(
        ENABLE_QUANTIZATION="false", MODEL_MAPPING=mapping
    )


def test_duplicate_alias_is_rejected() -> None:
    """MODEL_NAME must not also be an alias."""
    assert "rename one" in error_of(MODEL_NAME="a", MODEL_MAPPING='{"a": {"name": "x"}}')


def test_body_budget_has_room_for_one_request() -> None:
    """MAX_PENDING_BODY_MB must not be less than MAX_BODY_MB, so that an idle service accepts any allowed request."""
    assert error_of(MAX_PENDING_BODY_MB="1").startswith("EMB_PROVIDER_MAX_PENDING_BODY_MB=1: must not be less")
    assert load(MAX_BODY_MB="3").limits.max_pending_body_bytes == 24 * 1000**2


def test_unknown_name_is_reported_with_a_suggestion() -> None:
    """A misspelled setting is reported and does not prevent the start."""
    _, warnings = load_settings(NO_FILE, {"EMB_PROVIDER_MAX_BATCHSIZE": "1", "EMB_PROVIDER_XYZZY": "1", "OTHER": "1"})
    assert len(warnings) == 2
    assert "did you mean EMB_PROVIDER_MAX_BATCH_SIZE?" in warnings[0]
    assert "docs/configuration.md" in warnings[1]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("EMB_PROVDER_PORT", "did you mean EMB_PROVIDER_PORT?"),
        ("EMBPROVIDER_API_KEYS", "did you mean EMB_PROVIDER_API_KEYS?"),
        ("EMB_PROVIDERS_MODEL_NAME", "did you mean EMB_PROVIDER_MODEL_NAME?"),
        ("emb_provider_port", "did you mean EMB_PROVIDER_PORT?"),
        ("LLM_PROVIDER_PORT", None),
        ("PORT", None),
        ("EMB_PROVDER_XYZZY", None),
    ],
)
def test_misspelled_prefix_is_reported(name: str, warning: str | None) -> None:
    """Variables of other programs are not."""
    _, warnings = load_settings(NO_FILE, {name: "1"})
    assert warnings == ([f"{name} is an unknown setting and is ignored: {warning}"] if warning is not None else [])


def test_all_wrong_values_are_reported(tmp_path: Path) -> None:
    """One line each: fields of one group and of several, values of other tools, JSON, and contradictions."""
    with pytest.raises(SettingsError) as caught:
        load(
            PORT="x", LOG_LEVEL="loud", MAX_BATCH_SIZE="0", MAX_BODY_MB="-1", _MODEL_HUB="github", HUB_NAMES="{",
            MODEL_MAPPING='{"a": {"name": "x", "device": "tpu", "dimensions": "some"}, "b": {}}', CACHE_DIR="a\tb",
        )  # fmt: skip
    lines = str(caught.value).splitlines()
    assert sorted(re.split("[=: ]", line)[0].removeprefix(PREFIX) for line in lines) == [
        "CACHE_DIR", "HUB_NAMES", "LOG_LEVEL", "MAX_BATCH_SIZE", "MAX_BODY_MB", "MODEL_HUB", "MODEL_MAPPING",
        "MODEL_MAPPING", "MODEL_MAPPING", "PORT",
    ]  # fmt: skip
    with pytest.raises(SettingsError) as caught:
        load(MIN_BATCH_SIZE="65", MAX_PENDING_BODY_MB="1", ENABLE_QUANTIZATION="false", MODEL_PRECISION="int8")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(("quoted", "value"), [('"k1,k2"', ("k1", "k2")), ("'k1'", ("k1",)), ('"', ('"',))])
def test_quotes_of_the_environment_are_removed(quoted: str, value: tuple[str, ...]) -> None:
    """`docker run --env-file` does not remove them, and clients would get 401 with the right key."""
    assert load(API_KEYS=quoted).server.accepted_keys == value
    assert specs(_MODEL_HUB='"modelscope"', MODEL_NAME="o/n")["o/n"].source == "modelscope"
    assert "x" in specs(MODEL_MAPPING="""'{"x": {"name": "y"}}'""")


def test_ambiguous_quotes_are_rejected(tmp_path: Path) -> None:
    """In the environment and in `.env`, and the value is not shown."""
    expected = "EMB_PROVIDER_API_KEYS: its value begins and ends with a quote, and contains others: remove the quotes."
    assert error_of(API_KEYS='"hush-1","hush-2"') == expected
    (tmp_path / ".env").write_text('EMB_PROVIDER_API_KEYS="hush-1","hush-2"\n')
    with pytest.raises(
        SettingsError, match="the line of EMB_PROVIDER_API_KEYS is not valid: write NAME=VALUE"
    ) as caught:
        load_settings(tmp_path / ".env", {})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ('EMB_PROVIDER_CACHE_DIR="D:\\new\\table"', None),
        ("EMB_PROVIDER_CACHE_DIR='D:\\new\\table'", "D:\\new\\table"),
        ("EMB_PROVIDER_CACHE_DIR=D:\\new\\table", "D:\\new\\table"),
        ('EMB_PROVIDER_CACHE_DIR="D:/new/table"', "D:/new/table"),
        ('EMB_PROVIDER_MODEL_NAME="D:\\app"', None),
        ('EMB_PROVIDER_MODEL_MAPPING={"x": {"path": "D:\\new"}}', None),
    ],
)
def test_path_with_escape_sequences_is_rejected(tmp_path: Path, line: str, value: str | None) -> None:
    """The dotenv format and JSON turn `\\n` into a line break, and the directory would have another name."""
    (tmp_path / ".env").write_text(line, encoding="utf-8")
    if value is not None:
        assert load_settings(tmp_path / ".env", {})[0].hubs.cache_dir == Path(value)
        return
    with pytest.raises(SettingsError, match="contains a control character") as caught:
        load_settings(tmp_path / ".env", {})
    assert "\n" not in str(caught.value)


def test_values_that_the_environment_overrides_are_found(tmp_path: Path) -> None:
    """Those that are equal, and variables of other programs, are not."""
    file = tmp_path / ".env"
    file.write_text("EMB_PROVIDER_PORT=8000\nEMB_PROVIDER_HOST=0.0.0.0\nMODEL_HUB=modelscope\nOTHER=1\n")
    environ = {"EMB_PROVIDER_PORT": "9000", "EMB_PROVIDER_HOST": '"0.0.0.0"', "MODEL_HUB": "huggingface", "OTHER": "2"}
    assert overridden_names(file, environ) == ["EMB_PROVIDER_PORT", "MODEL_HUB"]


SERVICE_LINKS = {
    "EMB_PROVIDER_SERVICE_HOST": "10.0.0.1",
    "EMB_PROVIDER_SERVICE_PORT": "9000",
    "EMB_PROVIDER_SERVICE_PORT_HTTP": "9000",
    "EMB_PROVIDER_PORT": "tcp://10.0.0.1:9000",
    "EMB_PROVIDER_PORT_9000_TCP": "tcp://10.0.0.1:9000",
    "EMB_PROVIDER_PORT_9000_TCP_PROTO": "tcp",
    "EMB_PROVIDER_PORT_9000_TCP_PORT": "9000",
    "EMB_PROVIDER_PORT_9000_TCP_ADDR": "10.0.0.1",
    "EMB_PROVIDER_GPU_SERVICE_HOST": "10.0.0.2",
    "EMB_PROVIDER_GPU_PORT": "udp://10.0.0.2:9000",
    "EMB_PROVIDER_GPU_PORT_53_UDP_ADDR": "10.0.0.2",
}
"""What Kubernetes sets in a pod for the services `emb-provider` and `emb-provider-gpu`."""


def test_variables_of_kubernetes_services_are_ignored() -> None:
    """Only the one that has the name of a setting is reported, with what to do."""
    settings, (warning,) = load_settings(NO_FILE, SERVICE_LINKS | {"EMB_PROVIDER_HOST": "0.0.0.0"})
    assert (settings.server.port, settings.server.host) == (9000, "0.0.0.0")
    assert "EMB_PROVIDER_PORT=tcp://10.0.0.1:9000 is ignored" in warning
    assert "enableServiceLinks: false" in warning


def test_port_of_a_kubernetes_service_does_not_override_the_file(tmp_path: Path) -> None:
    """The value in `.env` is used, as without the link."""
    file = tmp_path / ".env"
    file.write_text("EMB_PROVIDER_PORT=8000\n")
    assert load_settings(file, SERVICE_LINKS)[0].server.port == 8000
    assert overridden_names(file, SERVICE_LINKS) == []


@pytest.mark.parametrize(("name", "value"), [("MODEL_HUB", "github"), ("USE_MODELSCOPE", "perhaps")])
def test_invalid_value_of_an_older_name_is_rejected(name: str, value: str) -> None:
    """Variables without our prefix are checked too."""
    assert error_of(**{f"_{name}": value}).startswith(f"{name}={value}: must be")


def test_error_does_not_contain_secrets() -> None:
    """An error about another setting shows no secret."""
    assert "hush" not in error_of(API_KEYS="hush", PORT="x")


def test_user_without_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of a container may have none. The cache directory must be set then, and `~` is rejected."""

    def no_user(_: object) -> NoReturn:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)
    monkeypatch.setattr(pwd, "getpwnam", no_user)
    with pytest.raises(SettingsError, match=r"^This user has no home .* Set EMB_PROVIDER_CACHE_DIR or HOME\.$"):
        load()
    assert load(CACHE_DIR=str(tmp_path)).hubs.cache_dir == tmp_path
    with pytest.raises(
        SettingsError, match=r"^EMB_PROVIDER_LOG_DIR=~/logs: ~ cannot be expanded, because this user .*\.$"
    ):
        load(CACHE_DIR=str(tmp_path), LOG_DIR="~/logs")


def test_default_log_directory_is_not_below_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service of systemd starts in `/`, where it may not create `logs`."""
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.chdir("/")
    assert load().logs.directory == Path("/state/emb_model_provider/log")
    assert load(LOG_DIR="logs").logs.directory == Path("logs")
    monkeypatch.chdir("/tmp")  # noqa: S108 - nothing is written
    assert load().logs.directory == Path("logs")


def test_the_origin_of_each_value_is_known(tmp_path: Path) -> None:
    """The variable that a value was read from, and the file if it is in one. Defaults have none."""
    env_file = tmp_path / ".env"
    env_file.write_text("EMB_PROVIDER_PORT=9001\nHF_TOKEN=in-file\nEMB_PROVIDER_LOG_LEVEL=DEBUG\n", encoding="utf-8")
    environ = {"HF_ENDPOINT": "https://mirror.example", "EMB_PROVIDER_LOG_LEVEL": "INFO", "EMB_PROVIDER_HOST": " "}
    settings, _ = load_settings(env_file, environ)
    assert settings.origins == {
        "hf_endpoint": "HF_ENDPOINT",
        "log_level": "EMB_PROVIDER_LOG_LEVEL",
        "port": f"{env_file}: EMB_PROVIDER_PORT",
        "hf_token": f"{env_file}: HF_TOKEN",
    }
