"""One robot of `benchmarks.serve`: openpi's own client, in a process and an environment of its own.

python openpi_robot.py NUMBER IMAGE_SIZE CAMERAS STATE_DIM TASK…: it reads lines `PORT REQUESTS` from its standard
input, asks so often as fast as it is answered, and writes a line of JSON with the seconds of each request.
"""

import json
import sys
import time

import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    number, size, cameras, dims, *tasks = sys.argv[1:]
    rng = np.random.default_rng(int(number))
    shape = int(size), int(size), 3
    observation = {f"observation/{camera}": rng.integers(0, 256, shape, np.uint8) for camera in cameras.split(",")}
    observation["prompt"] = tasks[int(number) % len(tasks)]
    clients: dict[str, WebsocketClientPolicy] = {}
    for line in sys.stdin:
        port, requests = line.split()
        if port not in clients:
            clients[port] = WebsocketClientPolicy("127.0.0.1", int(port))
        seconds = []
        for _ in range(int(requests)):
            observation["observation/state"] = rng.uniform(-1, 1, int(dims)).astype(np.float32)
            start = time.perf_counter()
            answer = clients[port].infer(observation)
            seconds.append(time.perf_counter() - start)
            assert np.isfinite(answer["actions"]).all()
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
