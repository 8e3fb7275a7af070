"""How many ranks share the rows of a picture of Wan's VAE. Pure arithmetic; no torch."""

# Latent rows that a rank must get for its help to pay. Each convolution waits for the neighbours' rows, computes two
# rows more, and reads all of its weights for less work. How many times as fast two gloo ranks of one thread each are as
# one of them, in float32, for pictures as wide as they are high; on two cores of an AMD EPYC that had a little other
# work, so measured twice where two numbers stand:
#
#     latent rows of each rank      2       4            5       6            8            12     16
#     embedded model, 17 frames     0.29    0.54, 0.59   0.78    0.66, 1.27   1.58, 1.74   1.30   1.43
#     Wan 2.1's VAE, 5 frames       1.03    0.86, 0.88           1.18         1.20, 1.41
#
# Twice or three times as wide, 4 rows come to 0.99 and 0.97; half as wide, 8 rows come to 0.85.
LEAST_ROWS = 6


def num_slabs(rows: int, ranks: int) -> int:
    """Into how many slabs pictures of so many latent rows are cut for a group of ranks: 1 for small ones."""
    return max(min(ranks, rows // LEAST_ROWS), 1)
