"""Grids: implementations of `flwr.serverapp.Grid` that run an unchanged ClientApp on virtual nodes.

    inprocess.InProcessGrid   every node in this process, one message at a time; starts at once
    ray_grid.RayGrid          a long-lived Ray actor for each node, here or on a cluster

Nothing is re-exported, so that running in this process does not import Ray.
"""
