"""Clients: every question of a group is held exactly once, and nobody is left empty."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedalign.config import Config, DataConfig, RunConfig
from fedalign.data.partition import build_clients, clients_per_group
from fedalign.data.records import SPLITS, Dataset, Item, Pair, SurveyItem
from fedalign.data.split import role, split_keys
from fedalign.errors import ConfigError, DataError


def survey(n: int, topics: int = 0, groups: tuple[str, ...] = ("a", "b")) -> Dataset:
    items = tuple(
        SurveyItem(
            id=str(i),
            question=f"Question {i}?",
            options=("yes", "no"),
            shares=dict.fromkeys(groups, (0.5, 0.5)),
            topic=f"topic {i % topics}" if topics else "",
            columns={"site": "xyz"[i % 3], "site@b": "only"},
        )
        for i in range(n)
    )
    return Dataset(form="survey", items=items)


def config(seed: int = 0, **data: object) -> Config:
    # "survey" needs no path here: the dataset is given.
    return Config(run=RunConfig(seed=seed), data=DataConfig(source="survey", **data))  # type: ignore[arg-type]


def test_one_client_a_group_holds_it_all_by_the_hash() -> None:
    dataset = survey(60)
    clients = build_clients(dataset, config(seed=5))
    assert [(c.name, c.group, c.form) for c in clients] == [
        ("a", "a", "survey"),
        ("b", "b", "survey"),
    ]
    for client in clients:
        for split in SPLITS:
            expected = [i.id for i in dataset.items if role(5, split_keys(i)[0], 0.2, 0.2) == split]
            assert [i.id for i in client.split(split)] == expected
            for item in client.split(split):
                assert isinstance(item, SurveyItem)
                assert set(item.shares) == {client.group}
        assert client.size == len(client.train)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(60, 120),
    clients=st.integers(1, 5),
    kind=st.sampled_from(["sizes", "dirichlet"]),
    topics=st.sampled_from([0, 4]),
    alpha=st.sampled_from([0.02, 0.5, 50.0]),
    seed=st.integers(0, 50),
)
def test_partition_is_exact(
    n: int, clients: int, kind: str, topics: int, alpha: float, seed: int
) -> None:
    dataset = survey(n, topics)
    made = config(
        seed,
        partition=kind,
        clients_per_group=str(clients),
        dirichlet_alpha=alpha,
        validation=0.3,
        test=0.3,
    )
    dealt = build_clients(dataset, made)
    assert dealt == build_clients(dataset, made)
    assert [c.name for c in dealt] == sorted(c.name for c in dealt)
    for group in ("a", "b"):
        mine = [c for c in dealt if c.group == group]
        labels = [group] if clients == 1 else [f"{group}#{k}" for k in range(clients)]
        assert [c.name for c in mine] == labels
        assert all(c.train and c.validation for c in mine)
        held = Counter(i.id for c in mine for s in SPLITS for i in c.split(s))
        assert held == Counter(i.id for i in dataset.items)
        for split in SPLITS:
            roles = {role(seed, split_keys(i)[0], 0.3, 0.3) for c in mine for i in c.split(split)}
            assert roles == {split}
        if kind == "sizes":
            for split in SPLITS:
                sizes = [len(c.split(split)) for c in mine]
                assert max(sizes) - min(sizes) <= 1


def test_small_alpha_is_uneven_and_large_alpha_is_even() -> None:
    def spread(alpha: float) -> int:
        made = config(partition="dirichlet", clients_per_group="4", dirichlet_alpha=alpha)
        sizes = [len(c.train) for c in build_clients(survey(600), made) if c.group == "a"]
        return max(sizes) - min(sizes)

    assert spread(0.1) > 100
    assert spread(1000.0) < 60


def test_dirichlet_gives_clients_their_own_topics() -> None:
    made = config(partition="dirichlet", clients_per_group="2", dirichlet_alpha=0.01)
    clients = build_clients(survey(400, topics=8), made)
    mine = [c for c in clients if c.group == "a"]
    for topic in {i.topic for i in survey(8, topics=8).items if isinstance(i, SurveyItem)}:
        counts = [
            sum(isinstance(i, SurveyItem) and i.topic == topic for i in c.train) for c in mine
        ]
        assert max(counts) / sum(counts) > 0.9
        tested = [sum(isinstance(i, SurveyItem) and i.topic == topic for i in c.test) for c in mine]
        assert counts.index(max(counts)) == tested.index(max(tested))


def test_column_names_clients_and_long_layout_columns_win() -> None:
    clients = build_clients(survey(90), config(partition="column", partition_column="site"))
    assert [(c.name, c.group) for c in clients] == [
        ("only", "b"),
        ("x", "a"),
        ("y", "a"),
        ("z", "a"),
    ]
    assert all(i.columns["site"] == "y" for s in SPLITS for i in clients[2].split(s))


def test_a_column_value_belongs_to_one_group() -> None:
    both = survey(90, groups=("a", "c"))  # no column of its own for c: x, y, z in both
    with pytest.raises(DataError, match=r"groups 'a' and 'c' .* named 'x': column 'site' has"):
        build_clients(both, config(partition="column", partition_column="site"))


def test_unknown_column_names_the_row_and_the_nearest() -> None:
    with pytest.raises(DataError, match=r"\d+: no column 'sites' to name the client\..*'site'"):
        build_clients(survey(30), config(partition="column", partition_column="sites"))


def test_pairs_of_one_prompt_stay_together() -> None:
    items: list[Item] = [
        Pair(id=f"{i}-{k}", prompt=f"p{i}", chosen=f"c{k}", rejected="r", group="a")
        for i in range(60)
        for k in range(3)
    ]
    made = config(partition="sizes", clients_per_group="3")
    clients = build_clients(Dataset("pairs", tuple(items)), made)
    owners: dict[str, set[str]] = {}
    for client in clients:
        assert client.size == len({i.key for i in client.train})
        for split in SPLITS:
            for item in client.split(split):
                owners.setdefault(item.key, set()).add(f"{client.name} {split}")
    assert len(owners) == 60
    assert all(len(o) == 1 for o in owners.values())


def test_clients_per_group() -> None:
    groups = ("a", "b", "c, d")
    assert clients_per_group("2", groups) == {"a": 2, "b": 2, "c, d": 2}
    assert clients_per_group("a=3,b=2", groups) == {"a": 3, "b": 2, "c, d": 1}
    assert clients_per_group("c, d=4;a=2", groups) == {"a": 2, "b": 1, "c, d": 4}
    for wrong in ("0", "x", "a=0", "a=", "1.5", "-1"):
        with pytest.raises(ConfigError, match="clients-per-group"):
            clients_per_group(wrong, groups)
    with pytest.raises(DataError, match="no group 'z'"):
        clients_per_group("z=2", groups)


def test_refused() -> None:
    with pytest.raises(ConfigError, match="has no effect with"):
        build_clients(survey(60), config(clients_per_group="2"))
    with pytest.raises(
        DataError, match=r"client 'a#\d+' has no (train|validation) question.*fewer"
    ):
        build_clients(survey(60), config(partition="sizes", clients_per_group="30"))
    items = tuple(
        SurveyItem(str(i), f"Q{i}?", ("y", "n"), {"a": (0.5, 0.5)}, split=SPLITS[i % 2])
        for i in range(10)
    )
    with pytest.raises(DataError, match=r"group 'a' has no test question\. Its group has 5 train"):
        build_clients(Dataset("survey", items), config())


def test_synthetic_clients_carry_the_people_of_their_group() -> None:
    from fedalign.data.load import load_dataset
    from fedalign.data.synthetic import respondents

    made = Config(data=DataConfig(partition="sizes", clients_per_group="isles=2"))
    clients = build_clients(load_dataset(made.data, 0), made)
    people = Counter[str]()
    for client in clients:
        people[client.group] += client.size
    assert len(clients) == 5
    for group, count in respondents("default").items():
        assert people[group] == pytest.approx(count, abs=1)
