"""Another attention backend on vTensor memory: it reads the same pages through their homes, as pages of slots."""

from __future__ import annotations

import pytest
from conftest import Start, StockAnswers
from fault_plan import FaultPlan
from server import PAGE_TOKENS, VTENSOR
from test_parallel import CORES
from test_server_outputs import check

pytestmark = pytest.mark.server


def test_torch_native_on_our_pool(start: Start, stock: StockAnswers, plan: FaultPlan) -> None:
    flags = ("--attention-backend=torch_native", "--max-total-tokens=1536", f"--chunked-prefill-size={4 * PAGE_TOKENS}")
    with start(*VTENSOR, *flags, then=CORES | plan.environment) as server:
        assert "; another attention backend on homes; " in server.start_line()
        padding_row = server.vtensor()["mappings"]
        check(server, stock.mixed, concurrency=1)
        check(server, stock.mixed, concurrency=8)
        check(server, [stock.twin] * 2, concurrency=2)
        check(server, stock.hungry, concurrency=8)
        server.flush_cache()
        check(server, stock.mixed, concurrency=8)
        assert server.vtensor()["mappings"] == padding_row, "nobody reads rows here"
        server.check_healthy()
