"""Model folders on disk.

download  fetches a model folder, or repairs one
"""
