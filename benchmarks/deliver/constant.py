"""The endpoint that a served model is compared with: the same payload, and always one answer."""

import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request

app = FastAPI(docs_url=None, redoc_url=None)


@app.post("/predict")
async def predict(request: Request) -> dict[str, Any]:
    """Read the payload as a model's endpoint has to, and answer without a model."""
    given = await request.json()
    return {"model": "constant", "predictions": [{"class": 0, "score": 1.0}] * len(given["inputs"])}


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", access_log=False)
