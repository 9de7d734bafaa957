"""refer.datasets: the published counts. Names and split systems are tested with REFER in test_refer_refer.py."""

from refer.datasets import PUBLISHED_COUNTS


def test_the_published_counts_add_up_to_the_totals_of_the_papers():
    totals = {
        key: (sum(counts.refs for counts in splits.values()), sum(counts.expressions for counts in splits.values()))
        for key, splits in PUBLISHED_COUNTS.items()
    }
    assert totals == {
        ("refcoco", "unc"): (50000, 142210), ("refcoco+", "unc"): (49856, 141564),
        ("refcocog", "umd"): (49822, 95010), ("refcocog", "google"): (49822, 95010),
    }  # fmt: skip
