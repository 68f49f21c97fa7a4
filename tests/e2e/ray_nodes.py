"""A Ray cluster of several nodes on this machine, in processes of its own: `python -m tests.e2e.ray_nodes CORES...`.

Prints its address, and ends when its standard input does. The environment decides about token authentication.
"""

import sys


def main(cores: list[int]) -> None:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], **small})
    for count in cores[1:]:
        cluster.add_node(num_cpus=count, **small)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
