"""Any command line ends in one line: overrides that nobody wrote, on the real configuration."""

import tempfile
from functools import cache

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from adadim_lightning.cli.app import config_dir
from tests.reliability.commands import Ended, run

MEMORY = 9_000_000_000  # of address space, of which the imports take a half
# These would start processes, or wait for those of other machines.
ELSEWHERE = ("trainer.devices", "trainer.num_nodes", "data.num_workers", "num_workers")
# Nothing is trained: the time is over when all is made.
NO_TIME = "trainer.max_time=00:00:00:00"
NUMBERS = ("nan", "-inf", "1e400", "-1", "0", "1", "2", "0.5", "9" * 40, str(2**63), "0x10", "1e-320")
GRAMMAR = ("[]", "[[]]", "[1,2", "[1,2,3]", "{}", "{a:1}", "{_target_:os.system,command:x}", "{a", "'", '"', "\\")
REFERENCES = ("${seed}", "${nope}", "${oc.env:NOPE}", "${", "${data}", "${seed.x}", "${oc.decode:[}", "???")
SWEEPS = ("a,b", "1,2", "range(3)", "choice(1,2)", "glob(*)", "interval(0,1)", "int(x)", "shuffle(1)")
WORDS = ("", "null", "true", "no", "None", "a b", "=", "x" * 5000, "é", "中文", "\u202e", "\U0001f600", "\t", "\n")
MEANT = ("adamw", "cpu", "digits", "mlp", "torch.nn.Linear", "os.system")
VALUES = (*NUMBERS, *GRAMMAR, *REFERENCES, *SWEEPS, *WORDS, *MEANT)


@cache
def keys() -> list[str]:
    """All keys of the configuration, and its groups."""

    def below(node: DictConfig, prefix: str = "") -> list[str]:
        found = []
        for key in map(str, node):
            found.append(f"{prefix}{key}")
            if OmegaConf.is_dict(node._get_node(key)) and not OmegaConf.is_interpolation(node, key):
                found += below(node[key], f"{prefix}{key}.")
        return found

    composed = run("train", "--cfg", "job")
    assert composed.code == 0, composed
    groups = {str(path.parent.relative_to(config_dir())) for path in config_dir().rglob("*.yaml")} - {"."}
    found = [
        *below(OmegaConf.create(composed.out)),
        *sorted(groups),
        "hydra.job.name",
        "hydra.nope",
        "hydra.sweep.dir",
    ]
    return [key for key in found if key not in ELSEWHERE]


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/~"), max_size=12)
key = st.deferred(lambda: st.sampled_from(keys()))
value = st.one_of(st.sampled_from(VALUES), text, st.integers().map(str), st.floats().map(str))
usual = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "", "", "+", "++"]),
    key,
    st.one_of(st.sampled_from(VALUES), st.integers().map(str), st.floats().map(str)),
)
odd = st.one_of(
    st.builds("{}={}".format, key, text),
    st.builds("{}{}.{}={}".format, st.sampled_from(["", "+"]), key, text, value),
    st.builds("{}={}".format, text, value),
    text,
)
override = st.one_of(usual, usual, usual, key.map("~{}".format), odd)


def assert_ends_in_one_line(command: str, ended: Ended, overrides: list[str]) -> None:
    assert "Traceback" not in ended.out + ended.err, (overrides, ended)
    assert ended.code in (0, 1, 2), (overrides, ended)
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("warning: ")]
    if ended.code:
        assert len(lines) == 1, (overrides, ended)
        assert lines[0].startswith(f"adadim-{command}: error: "), (overrides, ended)
    else:
        assert not lines, (overrides, ended)


def fuzz(command: str, overrides: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        more = ("run_dir=run", NO_TIME) if command == "train" else ()
        ended = run(command, *more, *overrides, limits={"RLIMIT_AS": MEMORY})
        assert_ends_in_one_line(command, ended, overrides)


some = st.lists(override, min_size=1, max_size=2, unique=True)


@settings(max_examples=20)
@given(some)
def test_no_override_of_train_ends_in_a_traceback(overrides: list[str]) -> None:
    fuzz("train", overrides)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-x"], "unrecognized arguments: -x; --help shows the usage"),
        (["seed=1", "-m", "seed=1,2"], "put flags such as -m before all overrides"),
        (["seed=${nope}"], "Interpolation key 'nope' not found"),
        (["seed=\x1b[31m"], r"got '\x1b[31m'"),  # shown, not sent to the terminal
    ],
)
def test_what_is_wrong_with_an_argument_is_said_in_one_line(arguments: list[str], words: str) -> None:
    ended = run("train", *arguments)
    assert_ends_in_one_line("train", ended, arguments)
    assert ended.code == 1
    assert words in ended.line


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(10))
def test_none_of_2000_overrides_of_train_ends_in_a_traceback(part: int) -> None:
    @seed(part)
    @settings(max_examples=200, derandomize=False)
    @given(some)
    def none_of_200(overrides: list[str]) -> None:
        fuzz("train", overrides)

    none_of_200()


MEASURED = ("ckpt", "weights", "out", "trust", "data", "backbone")
OTHERS = {
    "evaluate": (*MEASURED, "probes", "few_shot", "label_free.views", "seed"),
    "embed": MEASURED,
    "export": (*MEASURED, "format"),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", OTHERS)
@settings(max_examples=50)
@given(st.data())
def test_no_override_of_the_other_commands_ends_in_a_traceback(command: str, data: st.DataObject) -> None:
    fuzz(command, [f"{data.draw(st.sampled_from(OTHERS[command]))}={data.draw(value)}"])


@pytest.mark.slow
@settings(max_examples=50)
@given(
    st.lists(
        st.one_of(st.sampled_from(["--out", "--metric", "--baseline", "--nope", "-x", "."]), value), max_size=3
    )
)
def test_no_argument_of_report_ends_in_a_traceback(arguments: list[str]) -> None:
    fuzz("report", arguments)
