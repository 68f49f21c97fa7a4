"""A Ray cluster of several nodes on this machine, in processes of its own.

    python -m tests.e2e.ray_nodes CORES[:GPUS]...

Prints its address, and ends when its standard input does. A line `exchange NODE CORES` there kills the node whose id
begins with NODE, which must not be the first, and then adds one. The environment decides about token authentication.
"""

import sys


def main(head: dict[str, int], *others: dict[str, int]) -> None:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, **small})
    for resources in others:
        cluster.add_node(**resources, **small)
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:
        _, lost, new = line.split()
        [node] = [node for node in cluster.worker_nodes if node.node_id.startswith(lost)]
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(**resources_of(new), **small)
    cluster.shutdown()


def resources_of(node: str) -> dict[str, int]:
    cores, _, gpus = node.partition(":")
    return {"num_cpus": int(cores)} | ({"num_gpus": int(gpus)} if gpus else {})


if __name__ == "__main__":
    main(*map(resources_of, sys.argv[1:]))
