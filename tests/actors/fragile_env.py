"""An environment that asks a process of its own, over TCP, what every turn is worth: its number, on a line."""

import asyncio
from pathlib import Path

from rl.env import Observation, Step
from rl.task import Task


class Numbers:
    def size(self, split):
        return None

    def task(self, split, index):
        return Task(f"{split}-{index}", {"number": index}, str(index % 7))


class Fragile:
    tasks = staticmethod(lambda args, seed: Numbers())

    def __init__(self, args):
        self.port_file = Path(args["port_file"])

    async def reset(self, task):
        self.task, self.turns = task, 0
        return Observation([{"role": "user", "content": f"{task.answer}+{task.answer}"}])

    async def step(self, action):
        # A service that is gone: ConnectionError. One that dies while it is asked says nothing: the same.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.port_file.read_text()))
        try:
            writer.write(f"{self.task.prompt['number']}\n".encode())
            line = await reader.readline()
            if not line:
                raise ConnectionResetError("the service closed the connection")
        finally:
            writer.close()
        self.turns += 1
        reward = float(line)
        return Step(Observation([{"role": "user", "content": f"{self.turns}-1"}]), reward, done=self.turns == 2)

    async def close(self):
        pass


def worth(number: int) -> float:
    """What the service says of a task's turn."""
    return (number % 5 + 1) / 100


def serve(port_file: str) -> None:
    """The service, in a process of its own: slow enough to be killed with somebody waiting."""

    async def answer(reader, writer):
        number = int(await reader.readline())
        await asyncio.sleep(0.05)
        writer.write(f"{worth(number)}\n".encode())
        await writer.drain()
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        partial = Path(port_file).with_suffix(".partial")
        partial.write_text(str(server.sockets[0].getsockname()[1]))
        partial.rename(port_file)
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    import sys

    serve(sys.argv[1])
