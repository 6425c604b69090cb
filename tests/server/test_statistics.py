"""Which running statistics a model is judged and delivered with."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.fakes import app_folder
from umbel.loading import load
from umbel.run import run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.statistics import _pooled
from umbel.strategies.records import Manifest
from umbel.summary import lines
