"""A checkpoint of ours in transformers, without any code of ours: python load_in_transformers.py RUN_FOLDER"""

import sys
from pathlib import Path

from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
from transformers.utils import logging

logging.disable_progress_bar()
checkpoints = Path(sys.argv[1]) / "checkpoints"
checkpoint = checkpoints / (checkpoints / "latest").read_text().strip()

model = AutoModelForMaskedLM.from_pretrained(checkpoint)
tokenizer = AutoTokenizer.from_pretrained(checkpoint / "tokenizer")
fill_mask = pipeline("fill-mask", model=model, tokenizer=tokenizer)

print(f"transformers loaded {checkpoint} as {type(model).__name__}")
for guess in fill_mask("The President of the United [MASK] spoke.", top_k=3):
    print(f"  {guess['score']:6.1%}  {guess['token_str']}")
