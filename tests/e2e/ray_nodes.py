"""A Ray cluster of several nodes on this machine, in processes of its own: `python -m tests.e2e.ray_nodes CORES...`.

Prints its address, and ends when its standard input does. A line `exchange NODE CORES` there kills the node whose id
begins with NODE, which must not be the first, and then adds one. The environment decides about token authentication.
"""

import sys


def main(cores: list[int]) -> None:
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores[0], **small})
    for count in cores[1:]:
        cluster.add_node(num_cpus=count, **small)
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:
        _, lost, new_cores = line.split()
        [node] = [node for node in cluster.worker_nodes if node.node_id.startswith(lost)]
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=int(new_cores), **small)
    cluster.shutdown()


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]])
