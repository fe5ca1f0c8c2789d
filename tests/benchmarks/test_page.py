import os

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
    assert tab.run("document.querySelector('.board tbody tr').innerText").split("\t")[1].startswith("0.910 [")
    assert tab.run("document.querySelector('.matrix tbody tr td:nth-child(3)').innerText") == "1.00"
    assert "it <b>broke</b>" in tab.run("document.body.innerText")


def test_picking_agents_changes_the_chart_and_the_table(tab):
    tab.click("input[value=grpo]")
    assert tab.run(CURVES) == ["ppo", "base"]
    assert "grpo" not in tab.run(COLUMN)
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
    assert tab.run(COLUMN) == ["</script>", "base", "ppo"]
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
