import csv
import io
import itertools
import json
import os
from urllib.parse import unquote

import browser
import pytest
from results import record, write, write_optimum

from benchmarks.page import write_page

pytestmark = pytest.mark.skipif(
    not browser.find() and not os.environ.get("CI"), reason="no Chromium on this machine (apt-get install chromium)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    for environment in ("points", "shapes"):
        runs = [
            record(environment, agent, seed, [0.2, 0.3 + seed / 50, top + seed / 50])
            for agent, top in (("grpo", 0.6), ("ppo", 0.9), ("base", 0.2))
            for seed in range(2)
        ]
        write(
            results / f"{environment}.json", [*runs, record(environment, "</script>", 0, None, error="it <b>broke</b>")]
        )
    write_optimum(results)
    return write_page(results).as_uri()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """As many agents as the real one, whose curves end at nearly the same place, with every column."""
    results = tmp_path_factory.mktemp("crowded")
    names = ("base", "best-of-n", "grpo", *(f"flow-grpo-fast-{i}" for i in range(20)))
    runs = [
        {
            **record("points", agent, 0, [0.2, 0.3, 0.6 + i / 2000]),
            "setting": {"lr": 0.0025, "updates_per_rollout": 2, "clip_range": 0.0001},
            "held_out": {"points": 0.5},
        }
        for i, agent in enumerate(names)
    ]
    write(results / "points.json", [*runs, record("points", "grpo", 1, None, error="it broke")])
    write_optimum(results)
    return write_page(results).as_uri()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    assert browser.find(), "where CI is set the page is tested: .ci/run installs Chromium"
    with browser.Browser(browser.find(), tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def tab(chromium, page):
    """The page, freshly loaded; it must neither complain nor ask for anything but itself."""
    chromium.open("about:blank")
    chromium.requests.clear()
    chromium.errors.clear()
    chromium.open(page)
    yield chromium
    assert chromium.errors == []
    assert [url for url in chromium.requests if not url.startswith(("file:", "data:"))] == []


CURVES = "[...document.querySelectorAll('#charts figure:first-child .curve')].map(c => c.dataset.agent)"
SHAPE = "document.querySelector('#charts .curve[data-agent=ppo] path:not(.band)').getAttribute('d')"
COLUMN = "[...document.querySelectorAll('#tables section:first-child tbody tr')].map(r => r.dataset.agent)"
LABEL = "document.querySelector('#charts svg').getAttribute('aria-label')"


def test_it_shows_curves_a_table_and_a_matrix(tab):
    assert tab.run(CURVES) == ["ppo", "grpo", "base"]
    assert tab.run(COLUMN) == ["ppo", "grpo", "base", "</script>"]
    assert tab.run("document.querySelector('.board tbody td').innerText").split() == ["0.910", "[0.900,", "0.920]"]
    assert tab.run("document.querySelector('.matrix tbody tr td:nth-child(3)').innerText") == "1.00"
    assert "it <b>broke</b>" in tab.run("document.body.innerText")


def test_picking_agents_changes_the_chart_and_the_table(tab):
    tab.click("input[value=grpo]")
    assert tab.run(CURVES) == ["ppo", "base"]
    assert tab.run("[...document.querySelectorAll('#matrices tbody th')].map(t => t.textContent)") == ["ppo", "base"]
    assert "grpo" in tab.run(COLUMN)  # the table has everybody
    tab.click("button[data-pick=none]")
    assert tab.run("document.querySelector('#charts').innerText.includes('None of the picked agents')")
    tab.click("button[data-pick=all]")
    assert len(tab.run(CURVES)) == 3


def test_environments_are_picked_one_by_one(tab):
    titles = "[...document.querySelectorAll('figcaption')].map(c => c.textContent)"
    assert tab.run(titles) == ["points"]
    tab.click("input[value=shapes]")
    assert tab.run(titles) == ["points", "shapes"]
    tab.click("input[value='all environments']")
    assert tab.run(titles) == ["points", "shapes"]  # it has a table, and no curves
    assert tab.run("document.querySelectorAll('.board').length") == 3


def test_axes_change_the_curves(tab):
    seen = {(tab.run(SHAPE), tab.run(LABEL))}
    for axis, value in (("x", "kl"), ("y", "diversity"), ("x", "seconds"), ("y", "kl")):
        tab.run(f"document.querySelector('#{axis}').focus()")
        tab.run(
            f"(() => {{ const s = document.querySelector('#{axis}'); s.value = '{value}';"
            "s.dispatchEvent(new Event('change', {bubbles: true})) })()"
        )
        seen.add((tab.run(SHAPE), tab.run(LABEL)))
    assert len(seen) == 5


def test_the_optimum_is_drawn_over_kl_only(tab):
    optimum = "[...document.querySelectorAll('#charts text')].some(t => t.textContent === 'optimum')"
    assert not tab.run(optimum)
    tab.run("location.hash = 'env=points&x=kl&y=reward'")
    tab.run("new Promise(done => setTimeout(done, 50))")
    assert tab.run(optimum)


def test_the_table_sorts_both_ways_with_the_empty_rows_last(tab):
    tab.click("button[data-sort=gain]")
    assert tab.run(COLUMN) == ["ppo", "grpo", "base", "</script>"]
    tab.click("button[data-sort=gain]")
    assert tab.run(COLUMN) == ["base", "grpo", "ppo", "</script>"]
    assert tab.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_the_keyboard_alone_suffices(tab):
    tab.run("document.querySelector('input[value=grpo]').focus()")
    tab.press(" ", "Space")
    assert tab.run(CURVES) == ["ppo", "base"]
    tab.run("document.querySelector('button[data-sort=agent]').focus()")
    for _ in range(2):
        tab.press("Enter")
    assert tab.run(COLUMN) == ["</script>", "base", "grpo", "ppo"]
    assert tab.run("document.activeElement.dataset.sort") == "agent"  # the focus survives the sorting


def test_a_view_is_its_address(tab, page):
    tab.click("input[value=grpo]")
    tab.click("input[value=shapes]")
    tab.click("button[data-sort=kl]")
    address = tab.run("location.href")
    view = "[document.querySelector('#charts').innerHTML, document.querySelector('#tables').innerHTML]"
    before = tab.run(view)
    tab.open("about:blank")
    tab.open(address)
    assert tab.run(view) == before
    tab.open("about:blank")
    tab.open(page + "#env=nowhere&agent=nobody&x=up&y=down&sort=sideways")
    assert tab.run("document.querySelector('#x').value") == "network_calls"


def test_nothing_is_wider_than_a_narrow_window(tab):
    tab.resize(400, 800)
    assert tab.run("document.documentElement.scrollWidth") <= 400
    tab.resize(1400, 1000)


def test_it_opens_with_the_best_few_and_the_references(tab, crowded):
    tab.open(crowded)
    few = [f"flow-grpo-fast-{i}" for i in (19, 18, 17, 16)]
    assert tab.run(CURVES) == [*few, "grpo", "best-of-n", "base"]
    assert len(tab.run(COLUMN)) == 23
    bands = "[...document.querySelectorAll('.curve .band')].map(b => getComputedStyle(b).display)"
    assert set(tab.run(bands)) == {"inline"}
    tab.click("button[data-pick=all]")
    assert len(tab.run(CURVES)) == 23
    tab.click("button[data-pick=best]")
    assert len(tab.run(CURVES)) == 7


@pytest.mark.parametrize("axis", ["network_calls", "kl"])
def test_no_two_names_overlap(tab, crowded, axis):
    tab.open("about:blank")
    tab.open(crowded + f"#x={axis}")
    tab.click("button[data-pick=all]")
    boxes = tab.run(
        "[...document.querySelectorAll('#charts text.name')].map(t => t.getBoundingClientRect())"
        ".map(b => [b.left, b.right, b.top + 2, b.bottom - 2])"
    )
    assert len(boxes) == 23 + (axis == "kl")  # and the optimum's
    left, right, top, bottom = tab.run(
        "(b => [b.left, b.right, b.top, b.bottom])(document.querySelector('#charts svg').getBoundingClientRect())"
    )
    assert all(left <= box[0] and box[1] <= right and top <= box[2] and box[3] <= bottom for box in boxes)
    boxes.sort(key=lambda box: box[2])
    assert all(one[3] <= other[2] for one, other in itertools.pairwise(boxes))


def test_no_column_is_cut_off_at_1280_pixels(tab, crowded):
    tab.resize(1280, 900)
    tab.open(crowded)
    heads = tab.run("[...document.querySelectorAll('.board thead th')].map(h => h.textContent)")
    assert {"below the optimum", "held-out prompts", "setting", "seconds", "runs"} <= set(heads)
    assert tab.run(
        "[...document.querySelectorAll('.scroll')].every(s => s.scrollWidth <= s.clientWidth)"
        " && document.documentElement.scrollWidth <= 1280"
    )
    tab.resize(1400, 1000)


def test_columns_are_defined_beside_their_table(tab, crowded):
    tab.open(crowded)
    notes = tab.run("document.querySelector('#tables section').innerText")
    assert "Below the optimum: the largest reward that Gaussian policies reach" in notes
    assert "Diversity / base: std of the final latents" in notes


def test_all_tables_can_be_had_as_csv(tab):
    link = tab.run("document.querySelector('a.csv').href")
    rows = list(csv.DictReader(io.StringIO(unquote(link.partition(",")[2]))))
    assert {row["environment"] for row in rows} == {"points", "shapes", "all environments"}
    ppo = next(row for row in rows if (row["environment"], row["agent"]) == ("shapes", "ppo"))
    assert [float(ppo[f"reward{end}"]) for end in ("", "_low", "_high")] == pytest.approx([0.91, 0.9, 0.92])
    assert json.loads(ppo["setting"]) == {"lr": 0.001}
    assert next(row for row in rows if row["agent"] == "</script>")["error"] == "it <b>broke</b>"
