"""The verb `cost`: real runs of the command, its bounds, and what must grow with what."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import run

from tools import cost_tables
from trimtab.config import CostConfig
from trimtab.cost import CostResult, cost
from trimtab.costing.methods import Estimate
from trimtab.costing.ranges import Range
from trimtab.costing.sheet import read_sheet
from trimtab.costing.table import number, shown
from trimtab.costing.verdict import answers_to_pay_back, hosts_to_pay
from trimtab.errors import InputError

ASKED = ("cost", "--host-params", "70e9", "--small-params", "7e9", "--tokens", "50e6")


def asked(**values: object) -> CostConfig:
    base = {"host_params": 70e9, "small_params": 7e9, "tokens": 50e6, "price": 2.5}
    return CostConfig.model_validate({**base, **values})


def by_method(result: CostResult) -> dict[str, Estimate]:
    return {row.method: row for row in result.estimates}


def test_the_command_prints_a_table_and_its_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--gpu", "h100", "--price", "2.5") == 0
    shown_text = capsys.readouterr().out
    for row in ("zero-shot prompt", "Trimtab head+memory", "LoRA", "full fine-tuning"):
        assert f"\n{row} " in shown_text
    assert "assumptions" in shown_text and "$2.5 an hour (given)" in shown_text
    assert "$ all hosts" not in shown_text
    assert "not counted: people" in shown_text
    assert run(*ASKED, "--hosts", "5") == 0
    shown_text = capsys.readouterr().out
    assert "$ all hosts" in shown_text and "(listed, sheet of" in shown_text


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*ASKED, "--price", "2.5", "--hosts", "3", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["usd_per_gpu_hour"] == [2.5, 2.5]
    lora = content["methods"]["LoRA"]
    assert lora["usd_all_hosts"] == pytest.approx([3 * usd for usd in lora["usd_per_host"]])
    assert lora["usd_once"] == [0, 0] and lora["another_host"] == "train again"
    assert content["methods"]["Trimtab live"]["usd_per_host"] == [0, 0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "abacus"), "unknown GPU 'abacus'; the sheet has h100, h200, b200, a100"),
        (("--price", "-1"), "--price: Input should be greater than 0 (found -1.0)"),
        (("--tokens", "-5"), "--tokens: Input should be greater than or equal to 1 (found -5.0)"),
        (("--tokens", "nan"), "--tokens"),
        (
            ("--host-params", "70"),
            "--host-params: Input should be greater than or equal to 50000000",
        ),
        (("--hosts", "0"), "--hosts: Input should be greater than or equal to 1"),
        (("--utilisation-low", "0.6"), "utilisation_low must be at most utilisation_high"),
    ],
)
def test_nonsense_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*ASKED, *words) == 2
    said = capsys.readouterr().err
    assert message in said and "hint:" in said and "Traceback" not in said


def test_what_is_needed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("cost") == 2
    assert "--host-params is needed" in capsys.readouterr().err


def test_money_is_operations_over_speed_times_price() -> None:
    lora = by_method(cost(asked(utilisation_low=0.5, utilisation_high=0.5)))["LoRA"]
    computing = lora.flops / (989.4e12 * 0.5) / 3600
    loading = 4 * 140e9 / 5e9 / 3600
    assert lora.gpus == Range(4, 4)
    assert lora.usd.low == pytest.approx(2.5 * (computing + loading))


def test_head_and_memory_cost_less_than_lora_on_one_host() -> None:
    everything, limited = by_method(cost(asked())), by_method(cost(asked(fit_tokens=1e6)))
    name = "Trimtab head+memory"
    assert limited[name].usd.middle < everything[name].usd.middle < everything["LoRA"].usd.middle
    assert hosts_to_pay(limited[name], limited["LoRA"]) == 1
    assert hosts_to_pay(everything[name], everything["LoRA"]) == 1


def test_hosts_to_pay_are_the_fewest_at_which_one_way_is_cheaper() -> None:
    # A small model so large that the adapter takes several hosts to pay.
    large = {"small_params": 30e9}
    rows = by_method(cost(asked(**large)))
    name = "Trimtab head+memory"
    hosts = hosts_to_pay(rows[name], rows["LoRA"])
    assert hosts is not None and hosts > 1
    for count, cheaper in ((hosts - 1, False), (hosts, True)):
        rows = by_method(cost(asked(hosts=count, **large)))
        ours, theirs = (
            rows[row].usd_once.middle + count * rows[row].usd_per_host.middle
            for row in (name, "LoRA")
        )
        assert (ours < theirs) == cheaper


def test_live_pays_its_way_back_in_answers() -> None:
    rows = by_method(cost(asked()))
    live, rival, bare = rows["Trimtab live"], rows["LoRA"], rows["zero-shot prompt"]
    answers = answers_to_pay_back(live, rival, bare)
    dearer = live.usd_per_million_answer_tokens.middle - bare.usd_per_million_answer_tokens.middle
    assert live.usd.middle + answers * dearer == pytest.approx(rival.usd.middle)
    assert answers_to_pay_back(rival, live, bare) == 0
    assert answers_to_pay_back(live, rival, live) == float("inf")


def test_a_gpu_that_is_too_small_is_said_to_be() -> None:
    result = cost(asked(gpu="rtx4090", window_tokens=32_000))
    assert by_method(result)["full fine-tuning"].gpus is None
    assert "do not fit" in result.summary()


@settings(deadline=None, max_examples=30)
@given(
    st.floats(5e8, 1e12),
    st.floats(1e3, 1e11),
    st.integers(1, 100),
    st.sampled_from(sorted(read_sheet().gpus)),
)
def test_more_text_passes_and_hosts_never_cost_less(
    params: float, tokens: float, hosts: int, gpu: str
) -> None:
    few = asked(host_params=params, small_params=params / 10, tokens=tokens, gpu=gpu, price=None)
    results = [
        by_method(cost(few.model_copy(update=change)))
        for change in ({}, {"tokens": 2 * tokens}, {"epochs": 2}, {"hosts": hosts})
    ]
    for more in results[1:]:
        for method, row in results[0].items():
            assert row.usd.low <= more[method].usd.low * (1 + 1e-9)
            assert row.usd.high <= more[method].usd.high * (1 + 1e-9)
            assert row.usd.low <= row.usd.high and row.request.usd.low <= row.request.usd.high


@settings(deadline=None, max_examples=30)
@given(st.floats(0.01, 1000))
def test_money_is_proportional_to_the_price(price: float) -> None:
    one, other = by_method(cost(asked(price=1))), by_method(cost(asked(price=price)))
    for method, row in one.items():
        assert other[method].usd.high == pytest.approx(price * row.usd.high)
        assert other[method].request.usd.low == pytest.approx(price * row.request.usd.low)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.000394, "0.00039"), (1.6, "1.6"), (10, "10"), (249, "250"),
        (18_234, "18,000"), (1.04e6, "1e6"), (3.14e11, "3.1e11"), (2.5e-5, "2.5e-5"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_do(value: float, text: str) -> None:
    assert number(value) == text


def test_ranges_are_written_short() -> None:
    assert shown(Range(2, 4)) == "2-4" and shown(Range(4, 4.01)) == "4"
    assert shown(None) == "do not fit"


def test_the_documents_tables_follow_from_the_files() -> None:
    sheet = read_sheet()
    needed = cost_tables.demo_flops(sheet)
    assert set(needed) == {"tune", "record", "fit", "mount"}
    assert cost_tables.markdown(("a",), [("b|c",)]).endswith("| b\\|c |")
    assert cost_tables.said(Range(10, 20), Range(100, 200)) == "refuted: 5 to 20 times too high"
    assert cost_tables.said(Range(10, 20), Range(1, 2)) == "refuted: too low"
    assert cost_tables.said(Range(10, 20), Range(15, 30)) == "within the bounds"


def test_an_error_names_what_to_do() -> None:
    with pytest.raises(InputError, match="the sheet has") as found:
        cost(asked(gpu="tpu"))
    assert "--gpu" in found.value.hint
