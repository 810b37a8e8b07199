"""One replica: vLLM under the SLO scheduler hook, fed from Redis streams."""
