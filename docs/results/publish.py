"""Publishes finished records of experiments as pages of the documentation.

``python docs/results/publish.py runs/table1 ...``

A page is a folder with a small ``result.json``, what ``normkit report`` makes of it (``result.md``) and its figures. Paths of the
machine are left out, numbers are rounded to five digits and pictures reduced to the size at which they are printed.
"""

import argparse
import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

from PIL import Image

from normkit.lab import record
from normkit.lab.experiments import find_experiment, reshow

RESULTS = Path(__file__).parent
DIGITS, COARSE, MANY = 5, 3, 500  # significant digits; of clouds of points and of fields, which are only drawn
SIDE = 200  # pixels of a picture, as wide as a column of seven at 200 dots per inch


def publish(folder: Path, source: str) -> Path:
    """Writes the page of a record, and gives its folder."""
    found = record.read_json(folder / "result.json")
    config, about = found["config"], found["experiment"]
    experiment = find_experiment(about["kind"], about["name"])
    result = small(found["result"])
    if source and '"cifar' in json.dumps(result):
        result["source"] = source
    found["command"] = " ".join(experiment.words(config["scale"], config["seeds"], config["epochs"]))
    # Words of the experiment's file, which may have been mended since.
    about |= {"title": experiment.title, "claim": experiment.claim}
    found |= {"result": result, "sha256": record.digest(result)}
    page = RESULTS / about["name"]
    shutil.rmtree(page, ignore_errors=True)
    page.mkdir()
    record.write_bytes(
        page / "result.json", (json.dumps(found, separators=(",", ":"), ensure_ascii=False) + "\n").encode()
    )
    reshow(page)
    return page


def small(value: Any, digits: int = DIGITS) -> Any:
    """Rounds the numbers of a result and reduces its pictures."""
    if isinstance(value, dict):
        return {key: small(entry, digits) for key, entry in value.items()}
    if isinstance(value, list):
        many = bool(value) and isinstance(value[0], list) and sum(map(len, value)) > MANY
        return [small(entry, COARSE if many else digits) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    return reduced(value) if isinstance(value, str) and len(value) > 5000 else value


def reduced(picture: str) -> str:
    """Reduces a JPEG in base64."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="finished records")
    parser.add_argument("--source", default="", help="where the data is from, if it is CIFAR")
    options = parser.parse_args()
    for each in options.folders:
        made = publish(each, options.source)
        print(f"{made}: {(made / 'result.json').stat().st_size / 1000:.0f} kB")
