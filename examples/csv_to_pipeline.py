"""From a csv of your own to a served model: train with the launcher, load a `pipeline`, answer requests.

Run it from anywhere, offline, with the `demo` extra; under a minute on two cores:

    python examples/csv_to_pipeline.py --output_dir runs/csv-to-pipeline

It makes two csv files in place of yours. Add `--serve` to keep the server running.
"""

import argparse
import csv
import json
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from transformers import Pipeline, pipeline

from hf_ft_ext import demo_dataset
from hf_ft_ext.launch.run import main as train


def write_csv(path: Path, rows) -> None:
    """The file that you would have: a text and a label in each row, labels as words."""
    names = ("negative", "positive")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "verdict"])
        writer.writerows([row["sentence"], names[row["label"]]] for row in rows)


def serve(classify: Pipeline, port: int = 0) -> HTTPServer:
    """A server that answers `{"text": ...}` with label and score; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):  # do not log each request
            pass

        def do_POST(self):
            text = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["text"]
            answer = json.dumps(classify(text)[0]).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(answer)

    server = HTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def ask(server: HTTPServer, text: str) -> dict:
    address = f"http://127.0.0.1:{server.server_port}"
    request = urllib.request.Request(address, json.dumps({"text": text}).encode())
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/csv-to-pipeline"))
    parser.add_argument("--serve", action="store_true", help="answer requests until Ctrl-C")
    args = parser.parse_args(argv)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    data = demo_dataset()
    for split, name in (("train", "train.csv"), ("validation", "dev.csv")):
        write_csv(args.output_dir / name, data[split])

    # The same as `hf-ft-ext train --method lora --train_file ...`; without --model_name_or_path: the demo encoder.
    model = args.output_dir / "model"
    status = train(
        [
            "--method", "lora", "--train_file", str(args.output_dir / "train.csv"), "--validation_file",
            str(args.output_dir / "dev.csv"), "--text_columns", "review", "--label_column", "verdict",
            "--max_train_samples", "400", "--max_eval_samples", "200", "--sample", "stratified",
            "--num_train_epochs", "1", "--learning_rate", "2e-3", "--from_linearhead", "true",
            "--max_seq_length", "48", "--save_strategy", "no",
            "--output_dir", str(model), "--overwrite_output_dir",
        ]
    )  # fmt: skip
    if status:
        raise SystemExit(status)

    classify = pipeline("text-classification", model=str(model))  # the adapter, its head and its label names
    server = serve(classify)
    answer = ask(server, "the new series was boring and clumsy")
    print(f"http://127.0.0.1:{server.server_port} answers {answer}")
    if args.serve:
        threading.Event().wait()
    server.shutdown()
    server.server_close()
    return answer


if __name__ == "__main__":
    main()
