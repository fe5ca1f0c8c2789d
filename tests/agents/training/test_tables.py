from agents.training.tables import Table, read_table


def test_the_table_forgets_what_lies_after_the_checkpoint(tmp_path):
    table = Table(tmp_path / "t.csv", 0)
    for i in range(1, 5):
        table.append({"iteration": i, "reward": i / 3})
    with (tmp_path / "t.csv").open("a") as file:
        file.write("5,0.3")  # a line cut off by a crash
    Table(tmp_path / "t.csv", 2).append({"iteration": 3, "reward": 0.5})
    assert (tmp_path / "t.csv").read_text().splitlines()[-2:] == [f"2,{2 / 3}", "3,0.5"]


def test_a_rewards_name_may_hold_any_words(tmp_path):
    name = 'réward "$a_b$", 奖'
    Table(tmp_path / "t.csv", 0).append({"iteration": 1, name: 0.5})
    Table(tmp_path / "t.csv", 1).append({"iteration": 2, name: 0.25})
    assert read_table(tmp_path / "t.csv") == [{"iteration": 1, name: 0.5}, {"iteration": 2, name: 0.25}]
