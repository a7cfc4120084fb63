"""How much memory is worth it? Replays one workload with devices and hosts of several sizes.

    python examples/replay_sizes.py

Swap `conversations(...)` for `read_trace("your_trace.jsonl", 512)` to ask the same of your own traffic.
"""

from tiertree import WritePolicy
from tiertree.replay import Conversations, Replay, ReplayOptions, conversations

BLOCK_TOKENS = 512


def main() -> None:
    requests = conversations(Conversations(requests=800), BLOCK_TOKENS, seed=1)
    print(f"{'device':>8}{'host':>8}{'hit ratio':>11}{'of it host':>12}")
    for device in (128, 256, 512):
        for host in (0, device, 4 * device):
            options = ReplayOptions(device_pages=device, host_pages=host, write_policy=WritePolicy.WRITE_BACK)
            with Replay(options, requests) as replay:
                tally = replay.run().tally
            print(f"{device:8}{host:8}{tally.hit_ratio:11.4f}{tally.hits[1] / tally.pages:12.4f}")


if __name__ == "__main__":
    main()
