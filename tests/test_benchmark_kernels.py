"""The kernels' benchmark on a CPU: every way that runs there, its counts, its page, its verdicts.

Without a GPU our kernels are their references; all else is the code that a GPU runs.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.kernels import __main__ as command
from benchmarks.kernels import report, resources, tune
from benchmarks.kernels.alignment import Shape as AlignmentShape
from benchmarks.kernels.alignment import eager_loss
from benchmarks.kernels.attention import Shape as AttentionShape
from benchmarks.kernels.attention import formula
from benchmarks.kernels.case import (
    BOTH,
    FORWARD,
    RUNNING,
    Contender,
    Goal,
    Skipped,
    Table,
    phase_calls,
    run_case,
    table_of,
    tensors_of,
)
from benchmarks.kernels.measure import Ceilings, Row, Timing, Work, clock
from benchmarks.kernels.plan import TEACHER, TOKENS, Entry, ragged, tables
from benchmarks.kernels.step import (
    STEP,
    StepShape,
    make_batch,
    make_student,
    plain_objective,
    step_work,
)
from distill.students.vit import ViTSize

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CEILINGS = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)
TINY = tables(CPU, is_tiny=True, backend="aot_eager")
FULL = tables(CPU, is_tiny=False, backend="aot_eager")
NEVER, AT_ONCE = 1e12, 0.0
HERE = {  # ways beside "kernels" that a CPU has; torch.compile has a test of its own
    "attention-S": {
        "eager, bf16 norms, SDPA as torch chooses",
        "eager norms, SDPA Flash",
        "eager, norms in float32",
    },
    "attention-ragged": {"eager, a sequence at a time"},
    "alignment": {"eager, in bf16", "eager, in float32 as under autocast"},
    "alignment-3bit": {"eager, in bf16"},
    "linear-S": {
        "GEMM, then eager",
        "GEMM, then the alignment kernel",
        "kernels, by Gram matrices",
        "kernels, by chunks",
    },
    "linear-S-4bit": {
        "GEMM, then eager",
        "GEMM, then the alignment kernel",
        "kernels, by Gram matrices",
        "kernels, by chunks",
    },
    "rmsnorm-S": {"eager"},
    "patches-S": {"eager"},
    "decode-2bit": {"eager, in float16", "eager, in float32"},
}


def uncompiled(case):
    """Without what torch.compile takes seconds for."""
    kept = [c for c in case.contenders if "compile" not in c.name]
    return replace(case, contenders=kept)


def run(case, *, deadline=NEVER, done=(), seconds=0.0):
    saved = []
    table = run_case(
        case,
        device=CPU,
        ceilings=CEILINGS,
        seconds=seconds,
        deadline=deadline,
        done=list(done),
        save=lambda table: saved.append([row.note for row in table.rows]),
    )
    return table, saved


@pytest.mark.parametrize("name", HERE)
def test_every_way_that_a_cpu_has_is_timed_and_right(name):
    case = uncompiled(TINY[name].case())
    table, saved = run(case)
    assert [row.name for row in table.rows] == [c.name for c in case.contenders]
    timed = {row.name for row in table.rows if row.timings}
    assert timed == {"kernels", *HERE[name]}
    for row in table.rows:
        if row.name not in timed:
            assert row.note and row.note != RUNNING, row.name
            continue
        assert set(row.timings) == set(case.work), row.name
        assert all(timing.ms > 0 for timing in row.timings.values())
        assert set(row.errors) == {result for result in case.results if result}
        assert max(row.errors.values()) < 0.02, f"{row.name}: {row.errors}"
        assert max(row.errors.values()) > 0, row.name
    assert saved[0] == [RUNNING], "on disk before a row is begun"
    assert len(saved) == 2 * len(table.rows)


def test_a_compiled_way_is_right_and_reused_for_every_set():
    case = tables(CPU, is_tiny=True, backend="eager")["alignment"].case()
    only = [c for c in case.contenders if c.kind in ("eager", "compile")]
    table, _ = run(replace(case, contenders=only))
    row = next(row for row in table.rows if row.kind == "compile")
    assert row.timings, row.note
    assert max(row.errors.values()) < 0.02


def test_whole_steps_are_timed_and_their_gradients_right(monkeypatch):
    entry = TINY["step-S-4bit"]
    monkeypatch.setattr("benchmarks.kernels.step.torch.compile", lambda call, **_: call)
    table = entry.run(
        entry.case(),
        device=CPU,
        ceilings=CEILINGS,
        seconds=0.0,
        deadline=NEVER,
        done=[],
        save=lambda table: None,
    )
    assert len(table.rows) == 5
    for row in table.rows:
        assert row.timings[STEP].ms > 0, row.note
        assert 0 < max(row.errors.values()) < 0.02, row.errors


def test_a_way_that_fails_or_is_wrong_is_a_row_that_says_so():
    case = TINY["attention-S"].case()
    eager, ours = case.contenders[:2]

    def fail():
        raise ValueError("no such thing\nbelow")

    def skip():
        raise Skipped("is not installed")

    def shift():
        call = ours.make()
        return lambda *arguments: call(*arguments) * 1.05

    made = [Contender(n, "stock", m) for n, m in (("a", fail), ("b", skip), ("c", shift))]
    table, _ = run(replace(case, contenders=[eager, ours, *made]))
    notes = {row.name: row.note for row in table.rows}
    assert notes["a"] == "ValueError: no such thing"
    assert notes["b"] == "is not installed"
    rows = {cells[0]: cells for cells in report.phase_rows(table, BOTH)}
    assert rows["a"][1] == "-" and rows["a"][-1] == "ValueError: no such thing"
    assert rows["c"][9].endswith("WRONG") and not rows["kernels"][9].endswith("WRONG")
    goals = {goal[1]: goal for goal in report.goal_rows(table, "H200")}
    assert goals["time, the best stock path"][3] == "not measured", "a wrong row is no baseline"
    assert goals["time, eager"][3] != "not measured"


def test_after_the_deadline_nothing_is_compiled():
    table, _ = run(TINY["rmsnorm-S"].case(), deadline=AT_ONCE)
    assert [row.name for row in table.rows if row.timings] == ["eager", "kernels"]
    assert table.rows[2].kind == "compile" and table.rows[2].note == "not run: no time left"


def test_rows_that_are_there_are_not_measured_again():
    case = uncompiled(TINY["rmsnorm-S"].case())
    done = Row("eager", "eager", note="took the process down (exit code -6)")
    table, saved = run(case, done=[done])
    assert table.rows[0] is done and len(saved) == 2
    assert table.rows[1].timings


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_useful_flops_of_attention_are_those_a_counter_finds():
    shape = AttentionShape((5,), 3, 16)
    case = TINY["attention-88"].case()
    clips = 2
    inputs = case.make_inputs(0)
    qkv, *gains = inputs.arguments
    heads = 2
    packed = qkv.detach().view(clips, -1, qkv.shape[1]).float().requires_grad_()
    forward = counted(lambda: formula(packed, *gains, heads))
    assert case.work[FORWARD].flops == forward
    # Backward without keeping the scores computes them once more: five products, not four.
    both = counted(lambda: formula(packed, *gains, heads).sum().backward())
    assert case.work[BOTH].flops == both + forward / 2
    assert shape.width == 48


@pytest.mark.parametrize("name", ["linear-S", "patches-S", "decode-4bit"])
def test_useful_flops_of_products_are_those_a_counter_finds(name):
    case = TINY[name].case()
    eager = case.contenders[0].make()
    inputs = case.make_inputs(0)
    phase = list(case.work)[-1]
    assert case.work[phase].flops == counted(phase_calls(eager, inputs, phase))


@pytest.mark.parametrize("size", [ViTSize(48, 2, 3, pooled_width=32), ViTSize(32, 3, 2)])
def test_useful_flops_of_a_step_are_those_a_counter_finds(size):
    shape = StepShape(size, 2, 7, 96, 24, 2, frames=2, image_size=56)
    student = make_student(shape, CPU)
    batch = make_batch(shape, CPU, 0, None)
    for block in student.blocks:  # products that the counter sees, forward and backward

        def attend(x, module=block.attn):
            gains = module.q_norm.weight, module.k_norm.weight
            return module.proj(formula(module.qkv(x), *gains, module.heads))

        block.attn.forward = attend
    student.float()
    found = counted(lambda: plain_objective(student, batch, eager_loss).backward())
    of_attention = shape.clips * size.depth * 4 * (shape.visible + 1) ** 2 * size.width
    assert step_work(shape)[STEP].flops == found + of_attention / 2  # scores computed once more


def sizes(*groups):
    return sum(x.numel() * x.element_size() for group in groups for x in tensors_of(group))


def test_bytes_are_inputs_read_and_results_written_once():
    case = TINY["attention-S"].case()
    inputs = case.make_inputs(0)
    qkv = inputs.arguments[0]
    out, d_qkv, *_ = phase_calls(case.contenders[0].make(), inputs, BOTH)()
    assert case.work[FORWARD].size == sizes([qkv, out])
    assert case.work[BOTH].size == sizes([qkv, out], [qkv, out, inputs.upstream[0], d_qkv])

    case = TINY["alignment"].case()
    raw, *_, targets = case.make_inputs(0).arguments
    assert case.work[BOTH].size == sizes(raw, targets, raw)

    case = TINY["alignment-3bit"].case()
    raw, *_, targets = case.make_inputs(0).arguments
    assert case.work[BOTH].size == sizes(raw, targets[:2], raw)

    case = TINY["linear-S"].case()
    states, weights, *_, targets = case.make_inputs(0).arguments
    assert case.work[BOTH].size == sizes(states, weights, targets, states, weights)

    case = TINY["rmsnorm-S"].case()
    inputs = case.make_inputs(0)
    x, branch, *_ = inputs.arguments
    outputs = inputs.upstream
    assert case.work[FORWARD].size == sizes([x, branch], outputs)
    backward = sizes(outputs, [x, branch], [x, branch])  # h is as x
    assert case.work[BOTH].size == sizes([x, branch], outputs) + backward

    case = TINY["decode-2bit"].case()
    inputs = case.make_inputs(0)
    (rows,) = phase_calls(case.contenders[0].make(), inputs, FORWARD)()
    assert case.work[FORWARD].size == sizes(inputs.arguments[:2], [rows])


def test_full_shapes_are_the_published_ones():
    shapes = {name: entry.case().shape for name, entry in FULL.items()}
    assert shapes["attention-S"] == "128 x 411 tokens, 6 heads of 64"
    assert shapes["attention-L"] == "128 x 411 tokens, 16 heads of 64"
    assert shapes["alignment"] == f"6 layers x 128 x {TOKENS} x {TEACHER}, bf16"
    assert shapes["linear-B"] == f"6 layers x 128 x {TOKENS}, 768 to {TEACHER}, bf16 targets"
    lengths = ragged(128, 205, 617)
    assert (len(lengths), sum(lengths), min(lengths), max(lengths)) == (128, 128 * 411, 205, 617)
    # By hand: three tensors of 0.889 GB, three products, and a published estimate of a step.
    work = FULL["alignment"].case().work[BOTH]
    assert work.size == pytest.approx(2.67e9, rel=2e-3)
    assert FULL["linear-S"].case().work[BOTH].flops == pytest.approx(1.02e12, rel=5e-3)
    step = FULL["step-B"].case().work[STEP].flops / 128
    assert step == pytest.approx(257e9, rel=0.03)


def table_with(**rows):
    """A table of 1 MFLOP and 1 MB, whose floor is a millisecond; rows are ms, peak and error."""
    found = [
        Row(name, name.split("_")[0], {BOTH: Timing(ms, 0.02, "clock")}, peak, {"out": error})
        for name, (ms, peak, error) in rows.items()
    ]
    goals = (
        Goal("time", ("eager",), 8.0, 12.0),
        Goal("time", ("compile", "stock"), 1.2, 1.4),
        Goal("time", ("flex",), 1.5, 2.0),
        Goal("memory", ("eager",), 5.0, None),
        Goal("copy", (), 0.8, 0.9),
        Goal("gemm", (), 0.1, None),
        Goal("mfu", (), None, 0.3),
    )
    work = {BOTH: Work(1e6, 1e6)}
    return Table("t", "a title", "a shape", "bf16", work, CEILINGS, goals, found, "A note.")


def test_ratios_shares_and_verdicts_are_right():
    table = table_with(
        eager=(10.0, 500, 1e-2),
        ours=(1.25, 100, 1e-2),
        ours_2=(1.0, 50, 0.5),  # faster and wrong
        stock=(1.6, 0, 1e-2),
        stock_2=(1.0, 0, 0.5),
        compile=(2.0, 0, 1e-2),
    )
    rows = {row[1]: row for row in report.goal_rows(table, "NVIDIA H200")}
    assert rows["time, eager"][2:] == [
        *("ours / eager", "8.00x", "8.00x", "12.00x"),
        "must met, aim not met",
    ]
    assert rows["time, the best stock path"][2:4] == ["ours / stock", "1.28x"]
    assert rows["time, FlexAttention"][3:] == ["not measured", "1.50x", "2.00x", "not shown"]
    assert rows["memory, against eager"][3:] == ["5.00x", "5.00x", "-", "must met"]
    of_copy = rows["share of the copy's bandwidth"]
    assert of_copy[3:] == ["80 %", "80 %", "90 %", "must met, aim not met"]
    assert rows["share of the product's rate"][3:] == ["8 %", "10 %", "-", "must not met"]
    assert rows["model FLOPs of the data sheet's peak"][-1] == "aim not met"  # 8e8 of 989e12
    cells = dict(zip(report.HEADING, report.phase_rows(table, BOTH)[1], strict=True))
    assert cells == {
        "way": "ours",
        "ms": "1.25 ±1 %",
        "time over ours": "1.00x",
        "TFLOP/s": "0.0008",
        "of product": "8 %",
        "GB/s": "0.8",
        "of copy": "80 %",
        "of floor": "80 %",
        "peak MB": "0",
        "error": "1.0e-02",
        "timed by": "clock",
    }
    assert report.phase_rows(table, BOTH)[0][2] == "8.00x"


def test_tables_survive_being_written_and_the_page_names_what_is_missing(tmp_path):
    table = table_with(eager=(10.0, 500, 1e-2), ours=(1.25, None, float("nan")))
    report.write_json(tmp_path / "t.json", {"complete": True, "table": report.to_json(table)})
    page = command.write_page(tmp_path, ["t", "other"], tmp_path, "a GPU", {"commit": "c0ffee"})
    assert "- device: a GPU\n- commit: c0ffee\n" in page
    assert "No time was left for other." in page
    assert "nan WRONG" in page and "1 MFLOP" not in page
    found = report.from_json(json.loads((tmp_path / "kernels.json").read_text())["tables"][0])
    assert found.rows[0] == table.rows[0]
    assert (found.goals, found.work, found.ceilings) == (table.goals, table.work, table.ceilings)


def test_a_row_that_took_its_process_down_says_so_and_the_rest_goes_on(tmp_path):
    table = table_of(TINY["decode-2bit"].case(), CEILINGS)
    table.rows = [Row("eager, in float16", "eager", note=RUNNING)]
    path = tmp_path / "decode-2bit.json"
    report.write_json(path, {"complete": False, "table": report.to_json(table)})
    names = ["alignment", "decode-2bit"]
    assert command.died(tmp_path, names, "took the process down (exit code -11)")
    assert not command.died(tmp_path, names, "again")
    argv = ["--device", "cpu", "--tiny", "--seconds", "0", "--compile", "eager"]
    argv += ["--out", str(tmp_path)]
    options = command.parse([*argv, "--budget", "300"])
    command.watch(options, argv, ["decode-2bit"], tmp_path)
    found = json.loads(path.read_text())
    assert found["complete"]
    rows = report.from_json(found["table"]).rows
    assert rows[0].note == "took the process down (exit code -11)" and not rows[0].timings
    assert rows[1].name == "kernels" and rows[1].timings
    assert "exit code -11" in (tmp_path / "kernels.md").read_text()


def test_a_table_that_cannot_be_begun_says_why_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "ceilings", lambda device, seconds: CEILINGS)

    def fail():
        raise MemoryError("far too large")

    done = []
    entries = {"first": Entry(1, fail, run_case), "second": TINY["rmsnorm-S"]}
    settings = {"device": CPU, "seconds": 0.0, "deadline": NEVER}
    command.work_through(entries, tmp_path, **settings, publish=lambda: done.append(0))
    page = command.write_page(tmp_path, ["first", "second"], tmp_path, "a GPU", {})
    assert "first: could not be begun" in page and "MemoryError: far too large" in page
    assert "rmsnorm-S: residual add" in page and len(done) == 2


def test_the_benchmark_imports_neither_recipes_nor_decoders():
    code = "import sys, benchmarks.kernels.__main__; print(*sys.modules)"
    settings = {"check": True, "capture_output": True, "text": True, "cwd": ROOT}
    found = subprocess.run([sys.executable, "-c", code], **settings).stdout.split()
    unwanted = {"pydantic", "av", "decord", "deepspeed", "timm", "distill.recipe"}
    assert unwanted & set(found) == set()
    assert "distill.kernels.attention" in found


def test_a_clock_takes_calls_in_turn():
    calls = []
    timing = clock([lambda: calls.append(0), lambda: calls.append(1)], seconds=0.0)
    assert calls == [0, 1, 0, 1]  # once each to warm up
    assert timing.by == "clock" and timing.ms > 0


def test_launches_are_compiled_as_the_product_makes_them(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    entries = tables(CPU, is_tiny=False, backend="aot_eager", clips=16, tokens=3)
    launches = {one.name: one for one in resources.launches_of(entries["rmsnorm-S"].case())}
    assert set(launches) == {"rmsnorm_fwd", "rmsnorm_bwd"}
    launch = launches["rmsnorm_fwd"]
    types = dict(launch.types)
    assert (types["x"], types["branch"], types["out"]) == ("*fp32", "*bf16", "*bf16")
    assert dict(launch.constants)["DROPS"] is True and "BLOCK 512" in launch.choice
    assert "width" in launch.multiples_of_16 and "rows_per_clip" not in launch.multiples_of_16
    text, figures = resources.resources([launch])
    assert [one["capability"] for one in figures] == [80, 90, 100]
    for one in figures:
        assert one["spilled_bytes"] == 0 and 16 <= one["registers"] <= 128
        assert 1 <= one["blocks_at_once"] <= 16
    assert text.count("`rmsnorm_fwd`") == 1


def test_blocks_at_once_are_what_registers_shared_memory_and_threads_allow():
    def blocks(registers, shared, warps):
        made = SimpleNamespace(registers=registers, shared_bytes=shared)
        return resources.occupancy(made, warps, 90)

    assert blocks(128, 0, 4) == 4
    assert blocks(130, 0, 4) == 3  # registers come in eights
    assert blocks(32, 75 * 1024, 4) == 3
    assert blocks(16, 0, 8) == 8


def test_floors_are_work_over_the_data_sheet():
    text, figures = resources.floors({"alignment": FULL["alignment"]}, ("H200", "A100"))
    size = 6 * 128 * 411 * 1408 * 6
    assert figures[0]["bytes"] == size
    assert figures[0]["floor_ms"]["H200"] == pytest.approx(1e3 * size / 4.8e12)
    assert f"{1e3 * size / 2.039e12:.3g} (memory)" in text


def test_tuning_leaves_every_choice_at_its_fastest(monkeypatch, capsys):
    times = {("a", 1): 3.0, ("a", 2): 1.0, ("a", 4): 2.0}
    where = SimpleNamespace(NUM_WARPS=1)
    choice = tune.Choice(where, "NUM_WARPS", [1, 2, 4, 8])
    best, lines = tune.improve(choice, lambda: times["a", where.NUM_WARPS], 3.0, deadline=NEVER)
    assert (best, where.NUM_WARPS, choice.line()) == (1.0, 2, "NUM_WARPS = 2")
    assert lines[0] == "# NUM_WARPS = 2  1.0000 ms" and "KeyError" in lines[2]
    small = AlignmentShape(2, 2, 3, 96)
    monkeypatch.setattr(tune, "LOSS", small)
    monkeypatch.setattr(tune, "SHAPES", {(64, "short"): AttentionShape((5,) * 2, 1, 64)})
    tune.main(["attention,", "codes"], CPU, seconds=0.0, budget=0)
    out = capsys.readouterr().out
    assert '    ("dkv", 64, "short"): Config(tile=64, step=32, warps=4, stages=2),\n' in out
    assert "BLOCK_ROWS = 8\nBLOCK_GROUPS = 32\nNUM_WARPS = 4\n" in out
    assert "cut short: no time left" in out


def test_every_choice_of_the_tuner_is_there():
    for name, _, choices in tune.spaces(CPU):
        for choice in choices:
            assert choice.value is not None and len(choice.values) > 1, f"{name}: {choice.key}"
