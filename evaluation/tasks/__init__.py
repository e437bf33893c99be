"""Tasks by which models are scored, a file of JSON lines each: docs/tasks.md has the formats.

tasks = load_tasks(paths, tokenizer, report, max_tokens=1024, max_items=200)
for measured in measure(model, tasks, tokenizer.pad_id, report): ...
"""

from evaluation.tasks.load import load_tasks
from evaluation.tasks.measuring import Measured, measure, read

__all__ = ["Measured", "load_tasks", "measure", "read"]
