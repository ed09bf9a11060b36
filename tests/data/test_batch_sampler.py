"""Which rows a step trains on: worked out by hand, and the same for every layout of one global batch."""

from math import fsum

import pytest

from finetuning.data.batch_sampler import BatchSampler

ONE_BY_EIGHT = {"micro_batch": 8, "accumulation": 1, "processes": 1}
LAYOUTS_OF_EIGHT = [
    ONE_BY_EIGHT,
    {"micro_batch": 4, "accumulation": 1, "processes": 2},
    {"micro_batch": 2, "accumulation": 4, "processes": 1},
    {"micro_batch": 2, "accumulation": 2, "processes": 2},
    {"micro_batch": 1, "accumulation": 2, "processes": 4},
]
ROWS = [1, 3, 8, 11, 16, 29]  # fewer than a group, a whole number of groups, and partial last groups


def sampler(rows=11, micro_batch=2, accumulation=1, processes=1, process=0, seed=7, buckets=()):
    return BatchSampler(rows, micro_batch, accumulation, processes, process, seed, buckets)


def run(rows, layout, first_step=0, last_step=9, **more):
    """Each process's micro-batches."""
    return [
        list(sampler(rows, process=process, **layout, **more).micro_batches(first_step, last_step))
        for process in range(layout["processes"])
    ]


def weights_by_step(rows, layout):
    """{step: {row: weight}}, summed over processes and micro-batches."""
    found = {}
    for place in (place for process in run(rows, layout) for batch in process for place in batch):
        step = found.setdefault(place.step, {})
        step[place.row] = step.get(place.row, 0) + place.weight
    return found


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_EIGHT, ids=str)
def test_layouts_of_one_global_batch_train_on_the_same_rows_with_weights_that_sum_to_one(layout, rows):
    steps = weights_by_step(rows, layout)
    assert steps == weights_by_step(rows, ONE_BY_EIGHT)
    assert sorted(steps) == list(range(9))
    assert [fsum(step.values()) for step in steps.values()] == pytest.approx([1] * 9, abs=1e-12)


def test_an_epoch_of_11_rows_is_a_step_of_8_and_one_of_3():
    batches = list(sampler(11, **ONE_BY_EIGHT).micro_batches(0, 4))
    assert [[(place.epoch, place.step, place.weight) for place in batch] for batch in batches] == [
        [(0, 0, 1 / 8)] * 8, [(0, 1, 1 / 3)] * 3, [(1, 2, 1 / 8)] * 8, [(1, 3, 1 / 3)] * 3,
    ]  # fmt: skip
    assert sorted(place.row for place in batches[0] + batches[1]) == list(range(11))


def test_accumulated_micro_batches_end_the_step_once():
    # 7 rows in groups of 4: a whole group of two micro-batches, and 3 rows left as 2 and 1.
    batches = list(sampler(7, micro_batch=2, accumulation=2).micro_batches(0, 2))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    assert [batch[0].ends_step for batch in batches] == [False, True, False, True]
    assert [batch[0].weight for batch in batches] == [1 / 4, 1 / 4, 1 / 3, 1 / 3]


def test_a_process_without_rows_gets_padding_that_weighs_nothing():
    # 5 rows over 2 processes of 2: 4 rows, then one row that only the first process has.
    layout = {"micro_batch": 2, "accumulation": 1, "processes": 2}
    first, second = run(5, layout, 0, 2)
    only_row = sampler(5).permutation(0)[4]
    assert [(place.row, place.weight) for place in first[1]] == [(only_row, 1.0)]
    assert [(place.row, place.weight) for place in second[1]] == [(only_row, 0.0)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("layout", LAYOUTS_OF_EIGHT, ids=str)
def test_all_processes_take_part_in_the_same_micro_batches_with_rows_of_their_own(layout, rows):
    """Processes that disagree on how many micro-batches a step has wait for each other for ever."""
    for batches in zip(*run(rows, layout), strict=True):
        assert all(batches)
        assert len({(place.epoch, place.step, place.ends_step) for batch in batches for place in batch}) == 1
        weighted = [place.row for batch in batches for place in batch if place.weight]
        assert len(set(weighted)) == len(weighted)


@pytest.mark.parametrize("layout", LAYOUTS_OF_EIGHT, ids=str)
def test_resuming_at_any_step_yields_the_tail_of_the_whole_run(layout):
    whole = run(11, layout)
    for start in range(10):
        tails = run(11, layout, first_step=start)
        expected = [[batch for batch in process if batch[0].step >= start] for process in whole]
        assert tails == expected


def test_epochs_and_seeds_have_orders_of_their_own_that_need_no_history():
    orders = [tuple(sampler(50, seed=seed).permutation(epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(one) == list(range(50)) for one in orders)
    plan = sampler(50)
    later = plan.permutation(3)
    plan.permutation(0)
    assert sampler(50).permutation(3) == plan.permutation(3) == later


# Buckets

BUCKETS = [(8, 8) if row % 3 else (4, 12) for row in range(28)] + [(12, 4)]  # 18, 10 and 1 of 29 rows


def test_one_bucket_is_the_order_without_buckets():
    for layout in LAYOUTS_OF_EIGHT:
        assert run(29, layout, buckets=[(8, 8)] * 29) == run(29, layout)
    assert sampler(29, buckets=[(8, 8)] * 29).steps_per_epoch == sampler(29).steps_per_epoch == 15


def test_every_step_is_of_one_bucket_and_an_epoch_has_every_row_once():
    plan = sampler(29, micro_batch=8, buckets=BUCKETS)
    assert (plan.steps_per_epoch, plan.short_steps) == (6, 3)  # 18 = 8 + 8 + 2, 10 = 8 + 2, 1
    for epoch in range(3):
        groups = plan.groups(epoch)
        assert sorted(row for group in groups for row in group) == list(range(29))
        assert sorted(map(len, groups)) == [1, 2, 2, 8, 8, 8]
        assert all(len({BUCKETS[row] for row in group}) == 1 for group in groups)
        assert groups == [[place.row for place in batch] for batch in plan.micro_batches(6 * epoch, 6 * epoch + 6)]


def test_groups_keep_the_permutation_and_stand_where_their_first_row_stands():
    plan = sampler(29, micro_batch=8, buckets=BUCKETS)
    place = {row: number for number, row in enumerate(plan.permutation(0))}
    groups = plan.groups(0)
    assert [place[group[0]] for group in groups] == sorted(place[group[0]] for group in groups)
    for bucket in set(BUCKETS):
        rows = [row for group in groups for row in group if BUCKETS[row] == bucket]
        assert rows == [row for row in plan.permutation(0) if BUCKETS[row] == bucket]
        sizes = [len(group) for group in groups if BUCKETS[group[0]] == bucket]
        assert sizes[:-1] == [8] * (len(sizes) - 1)


@pytest.mark.parametrize(
    ("buckets", "group", "steps", "short"),
    [
        ("aaaaaaaa", 4, 2, 0),
        ("aaaabbbb", 4, 2, 0),
        ("aaaaabbb", 4, 3, 2),
        ("abcdefgh", 4, 8, 8),
        ("", 4, 2, 0),
        ("", 3, 3, 1),
    ],
)
def test_steps_of_an_epoch_and_the_short_ones_are_counted_by_bucket(buckets, group, steps, short):
    plan = sampler(8, micro_batch=group, buckets=buckets)
    assert (plan.steps_per_epoch, plan.short_steps, len(plan.groups(0))) == (steps, short, steps)


@pytest.mark.parametrize("layout", LAYOUTS_OF_EIGHT, ids=str)
def test_with_buckets_every_layout_trains_on_the_same_rows_and_resumes_exactly(layout):
    whole = run(29, layout, 0, 14, buckets=BUCKETS)
    steps = {}
    for place in (place for process in whole for batch in process for place in batch):
        row_weights = steps.setdefault(place.step, {})
        row_weights[place.row] = row_weights.get(place.row, 0) + place.weight
    plain = sampler(29, micro_batch=8, buckets=BUCKETS)
    for step, found in steps.items():
        epoch, number = divmod(step, 6)
        rows = plain.groups(epoch)[number]
        assert found == pytest.approx(dict.fromkeys(rows, 1 / len(rows)))
    for start in (1, 5, 6, 9):
        tails = run(29, layout, start, 14, buckets=BUCKETS)
        assert tails == [[batch for batch in process if batch[0].step >= start] for process in whole]
    ends = [[(batch[0].step, batch[0].ends_step) for batch in process] for process in whole]
    assert all(one == ends[0] for one in ends)
