import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdqc.base.diagnostics import ConfigError
from vdqc.base.scheme import (
    QDTYPES,
    Granularity,
    GranularityKind,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantScheme,
    QuantSpec,
    SparsitySpec,
)

specs = st.builds(
    QuantSpec,
    st.sampled_from([QDTYPES[f"int{bits}"] for bits in range(2, 9)]),
    st.sampled_from([PerTensor, PerChannel, PerGroup(32), PerGroup(128)]),
    st.booleans(),
    st.booleans(),
) | st.builds(
    QuantSpec,
    st.sampled_from([QDTYPES[f"int{bits}"] for bits in range(2, 9)]),
    st.sampled_from([PerChannel, PerGroup(32)]),
    st.booleans(),
    planes=st.integers(1, 2),
)


@given(specs)
def test_spec_parses_what_it_prints(spec: QuantSpec) -> None:
    assert QuantSpec.parse(str(spec)) == spec


@given(specs)
def test_range_has_all_codes_but_one_if_symmetric(spec: QuantSpec) -> None:
    codes = spec.qmax - spec.qmin + 1
    assert codes == 2**spec.dtype.bits - (1 if spec.symmetric else 0)


@pytest.mark.parametrize(
    ("text", "weight", "activation"),
    [
        ("w8a8", "int8/channel", "int8/token/dynamic"),
        ("w4a8-g64", "int4/group64", "int8/token/dynamic"),
        ("w3a6-asym", "int3/channel/asym", "int6/token/asym/dynamic"),
        ("w8a8-static", "int8/channel", "int8/tensor"),
        ("w4a4-wasym", "int4/channel/asym", "int4/token/dynamic"),
        ("w8a8-aasym-tensor", "int8/channel", "int8/tensor/asym/dynamic"),
        ("w4a16-g64", "int4/group64", "None"),
        ("w2+1a6", "int2+1/channel", "int6/token/dynamic"),
        ("w1+2a8-g16-wasym", "int1+2/group16/asym", "int8/token/dynamic"),
        ("none", "None", "None"),
        ("fp8", "fp8_e4m3/channel", "fp8_e4m3/token/dynamic"),
    ],
)
def test_scheme_means(text: str, weight: str, activation: str) -> None:
    scheme = QuantScheme.parse(text)
    assert (str(scheme.weight), str(scheme.input)) == (weight, activation)
    assert str(scheme) == text


@pytest.mark.parametrize(
    "text", ["w9a8", "w1a8", "w8", "w4a8-g0", "w4a8-g32-g64", "int8", "", "w8a3", "w2+3a6"]
)
def test_bad_scheme_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ConfigError, match="expected w<2"):
        QuantScheme.parse(text)


def test_static_token_scale_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected dynamic"):
        QuantSpec(QDTYPES["int8"], PerToken)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int1/channel", "expected asymmetric"),
        ("int2+1/token/dynamic", "integer weights"),
        ("fp8_e4m3+1/channel", "integer weights"),
        ("int2+7/channel", "expected 1 or 2 planes"),
    ],
)
def test_bits_and_planes_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantSpec.parse(text)
    assert QuantSpec.parse("int2+1/channel").bits == 3


def test_asymmetric_float_is_refused() -> None:
    with pytest.raises(ConfigError, match="no zero point"):
        QuantSpec.parse("fp8_e4m3/channel/asym")


def test_granularity_names() -> None:
    assert str(Granularity(GranularityKind.GROUP, 64)) == "group64"
    with pytest.raises(ConfigError, match="unknown granularity"):
        Granularity.parse("row")


def test_density_is_a_share() -> None:
    assert str(SparsitySpec("svg", 0.25)) == "svg{density=0.25}"
    with pytest.raises(ConfigError, match=r"\(0, 1\]"):
        SparsitySpec("svg", 0.0)
