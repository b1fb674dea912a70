import pytest
from PIL import Image

from pikastream_jax.training.metrics import MetricsFile

pytest.importorskip("matplotlib", reason="the plots need the extra `train`")
from pikastream_jax.training import plots  # noqa: E402


def test_plot_draws_a_picture(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    for step, loss in ((20, 9.0), (80, 2.0), (100, 1.5)):
        metrics.append(step, "train", {"loss": loss, "psnr": 20 - loss}, updates_per_second=3.0, seconds=1.0)
        metrics.append(step, "held_out", {"loss": loss})
    metrics.close()
    picture = plots.plot(tmp_path)
    assert picture == tmp_path / "loss.png"
    image = Image.open(picture)
    assert image.size[0] > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 10


def test_an_overview_has_a_panel_for_every_run(tmp_path, monkeypatch):
    for run in ("low", "other/low"):
        (tmp_path / run).mkdir(parents=True)
        metrics = MetricsFile(tmp_path / run / "metrics.jsonl", 0)
        for step, loss in ((20, 9.0), (100, 1.5)):
            metrics.append(step, "train", {"loss": loss, "psnr": 20 - loss})
        metrics.close()
    sizes = []
    for runs in (["low"], ["low", "other/low"]):
        out = tmp_path / f"{len(runs)}.png"
        monkeypatch.setattr("sys.argv", ["plots", *(str(tmp_path / run) for run in runs), "--out", str(out)])
        assert plots.main() == 0
        sizes.append(Image.open(out).size)
    assert sizes[1][0] == 2 * sizes[0][0] and not (tmp_path / "low" / "loss.png").exists()


def test_plot_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no metrics.jsonl"):
        plots.plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no rows yet"):
        plots.plot(tmp_path)
