"""Finds the image set that a sealed artifact was made from, and checks that its files have not changed."""

from __future__ import annotations

from stages.base import Artifact, Content, StageError
from stages.data.files import sha256_of_all
from stages.data.images.config import FileSet, ImageSet


def images_of(artifact: Artifact) -> ImageSet:
    """Return the setting `images` of an artifact's stage. Raises StageError if the files changed since it was made."""
    images: ImageSet = artifact.stage.images  # type: ignore[attr-defined]
    if isinstance(images, FileSet):
        marker = next(m for m in type(images).model_fields["path"].metadata if isinstance(m, Content))
        try:
            found = f"sha256:{sha256_of_all(images.path, marker.patterns(images.path))}"
        except OSError as error:
            raise StageError(f"the images of {artifact.folder}: {error}") from None
        if found != artifact.record["identity"]["contents"]["images.path"]:
            raise StageError(
                f"{images.path} changed since {artifact.folder} was made from it; name a stage of `kind: "
                f"{artifact.kind}` instead of this folder, so that it is made again"
            )
    return images
