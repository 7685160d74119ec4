"""Meshes: which triangle each pixel sees, colours and their gradients, and files that are read, written and refused."""

import math
import shutil

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from stages.base import StageError
from stages.networks.pixel import PixelDiffusion
from stages.optimize.cameras import Cameras
from stages.optimize.config import RepresentationMaterials
from stages.optimize.representations.base import Views
from stages.optimize.representations.mesh.config import MeshConfig
from stages.optimize.representations.mesh.particles import Mesh
from stages.optimize.representations.mesh.rays import first_hits
from stages.optimize.representations.mesh.surface import load
from tests.support.cli import ROOT
from tests.support.networks import adapter_around, pixel_unet
from tests.support.pipelines import TINY, plan_of

CUBE = ROOT / "manifests" / "cube.obj"
QUAD = """
v 0 -1 -1
v 0 1 -1
v 0 1 1
v 0 -1 1
vt {0} 0
vt {1} 0
vt {1} {2}
vt {0} {2}
f 1/1 2/2 3/3 4/4
"""
"""A square that faces +x, z up, whose UV coordinates run from the lower left corner."""
BENT = """
v 0 0 0
v 0.3 2 0
v -0.4 0.5 1.5
v 1.1 -0.2 0.6
vt 0 0
vt 1 0
vt 0.3 0.9
vt 0.1 0.6
f 1/1 2/2 3/3
f 1/1 3/3 4/4
"""
"""Two triangles without any symmetry."""
FLAT = "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"
PLY = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n" + (
    "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n"
)
"""A triangle with a vertex that does not exist."""


@pytest.fixture(scope="module")
def teacher():
    adapter = adapter_around(pixel_unet(), PixelDiffusion)
    adapter.latent_shape = (3, 8, 8)
    return adapter


def camera(azimuth=0.0, elevation=0.0, distance=3.0, field_of_view=60.0):
    return Cameras(*(torch.tensor([v], dtype=torch.float64) for v in (azimuth, elevation, distance, field_of_view)))


def view(**where):
    return Views(torch.tensor([0]), camera(**where))


FILLED = view(field_of_view=2 * math.degrees(math.atan(math.sqrt(0.5) / 3)))
"""The square fills the image."""


def mesh_of(teacher, file, count=1, **changes):
    torch.manual_seed(0)
    config = MeshConfig(path=str(file), shown=8, resolution=8, **{"background": "white", **changes})
    return Mesh(teacher, count, config, load(file)).double()


def written(folder, text, name="mesh.obj"):
    (folder / name).write_text(text)
    return folder / name


def paint(mesh, colours):
    """Give the first particle these colours, in (0, 1)."""
    mesh.state[0].data.copy_(torch.as_tensor(colours).logit())


def random_texture(side):
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(1)).double() * 0.8 + 0.1


# --- Hits ---

CORNER = st.tuples(st.floats(-1.2, 1.2), st.floats(-1.2, 1.2))


@settings(max_examples=30, deadline=None)
@given(st.tuples(CORNER, CORNER, CORNER), st.floats(-1, 1))
def test_a_pixel_is_hit_if_its_centre_is_in_the_projected_triangle(flat, x):
    side, reach = 24, 3.0 - x
    corners = torch.tensor([[(x, *corner) for corner in flat]], dtype=torch.float64)
    pixels = first_hits(corners, camera(), side).pixels
    half = reach * math.tan(math.pi / 6)
    a, b, c = (np.array([y + half, half - z]) * side / (2 * half) for y, z in flat)
    rows, columns = np.divmod(np.arange(side**2), side)
    centres = np.stack([columns, rows], -1) + 0.5

    def left(start, end):
        return (end - start)[0] * (centres - start)[:, 1] - (end - start)[1] * (centres - start)[:, 0]

    sides = np.stack([left(a, b), left(b, c), left(c, a)])
    inside = (sides > 0).all(0) | (sides < 0).all(0)
    hit = np.isin(np.arange(side**2), pixels.numpy())
    clear = abs(sides).min(0) > 1e-5
    assert (hit == inside)[clear].all()


def test_a_triangle_covers_its_projected_area():
    a, b, c = (np.array(corner) for corner in ((-0.7, -0.63), (0.81, -0.17), (-0.23, 0.92)))
    corners = torch.tensor(np.array([[[0.5, *corner] for corner in (a, b, c)]]))
    side, scale = 256, 256 / (2 * 2.5 * math.tan(math.pi / 6))
    area = 0.5 * ((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0]) * scale**2
    perimeter = sum(np.linalg.norm(edge) for edge in (b - a, c - b, a - c)) * scale
    assert abs(len(first_hits(corners, camera(), side).pixels) - area) < 0.05 * perimeter


def facing(x, size, turned=False):
    corners = [(x, -size, -size), (x, size, -size), (x, 0.0, size)]
    return corners[::-1] if turned else corners


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
@pytest.mark.parametrize("turned", [False, True])
def test_the_nearest_triangle_is_seen_from_both_sides_but_not_behind_the_camera(order, turned):
    triangles = torch.tensor([facing(-0.5, 0.9, turned), facing(0.5, 0.4, turned), facing(4.0, 0.5, turned)]).double()
    hits = first_hits(triangles[order], camera(), 32)
    names = torch.tensor(order)[hits.faces]
    _, directions = camera().rays(32)
    ahead = -directions.reshape(-1, 3)[hits.pixels, 0]
    assert set(names.tolist()) == {0, 1}
    assert_close(hits.distances * ahead, torch.where(names == 0, 3.5, 2.5).double())
    front = first_hits(triangles[1:2], camera(), 32).pixels
    assert torch.equal(hits.pixels[names == 1], front)


def all_pairs(corners, where, side):
    """The distances of the first hits (side^2,), inf without one, and the numbers of the triangles, by Cramer's rule:
    origin + t d = a + u (b - a) + v (c - a)."""
    (origin,), (directions,) = where.rays(side)
    a, ab, ac = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    rays, normal = directions.reshape(-1, 3), torch.linalg.cross(ab, ac)
    scale = -rays @ normal.T
    u = -rays @ torch.linalg.cross(origin - a, ac).T / scale
    v = -rays @ torch.linalg.cross(ab, origin - a).T / scale
    t = (normal * (origin - a)).sum(-1) / scale
    return torch.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0), t, torch.inf).min(1)


def triangles_around(count):
    generator = torch.Generator().manual_seed(3)
    centres = torch.randn(count, 1, 3, generator=generator).double()
    return centres + 1.5 * torch.randn(count, 3, 3, generator=generator).double()


WITHIN = camera(30.0, 20.0, 1.5, 70.0)


def test_hits_equal_those_of_a_search_over_all_triangles():
    corners = triangles_around(90)
    hits, (nearest, faces) = first_hits(corners, WITHIN, 96), all_pairs(corners, WITHIN, 96)
    assert torch.equal(hits.pixels, nearest.isfinite().nonzero()[:, 0])
    assert torch.equal(hits.faces, faces[hits.pixels])
    assert_close(hits.distances, nearest[hits.pixels], rtol=1e-9, atol=0)


def test_the_visible_part_of_a_triangle_that_reaches_behind_the_camera_is_seen():
    origin, backward = WITHIN.to_world()[0, :3, 3], WITHIN.to_world()[0, :3, 2]
    corners = triangles_around(200) + origin
    behind = (corners - origin) @ backward > 0
    crossing = corners[behind.any(1) & ~behind.all(1)]
    seen = [first_hits(one[None], WITHIN, 12).pixels for one in crossing]
    assert sum(len(pixels) > 0 for pixels in seen) > 10
    for one, pixels in zip(crossing, seen, strict=True):
        assert torch.equal(pixels, all_pairs(one[None], WITHIN, 12)[0].isfinite().nonzero()[:, 0])


# --- Colours ---


def test_vertex_colours_are_interpolated_on_the_surface(teacher, tmp_path):
    mesh = mesh_of(teacher, written(tmp_path, BENT), up="z")
    slopes = torch.tensor([[0.3, 0.1, -0.2], [-0.1, 0.2, 0.1], [0.0, -0.3, 0.2]]).double()
    linear = lambda points: 0.5 + points @ slopes.T  # noqa: E731
    paint(mesh, linear(torch.from_numpy(mesh.surface.placed("z"))))
    where = view(azimuth=20.0, elevation=15.0, distance=2.0)
    look = mesh.look(where, 24)
    (origin,), (directions,) = where.cameras.rays(24)
    seen = look.opacity[0, 0] == 1
    assert seen.sum() > 40 and (look.depth[0, 0][~seen] == 0).all() and (look.images[0, :, ~seen] == 1).all()
    points = origin + look.depth[0, 0][..., None] * directions
    assert_close(look.images[0].permute(1, 2, 0)[seen], linear(points[seen]))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_square_shows_its_texture_upright_and_repeated(teacher, tmp_path, repeats):
    mesh = mesh_of(teacher, written(tmp_path, QUAD.format(0, repeats, repeats)), up="z", texture=8)
    texture = random_texture(8)
    paint(mesh, texture)
    assert_close(mesh.look(FILLED, 8 * repeats).images[0], texture.repeat(1, repeats, repeats))


def test_colours_are_interpolated_between_texels_even_across_the_border(teacher, tmp_path):
    mesh = mesh_of(teacher, written(tmp_path, QUAD.format(1 / 16, 1 + 1 / 16, 1)), up="z", texture=8)
    texture = random_texture(8)
    paint(mesh, texture)
    shown = mesh.look(FILLED, 8).images[0]
    assert_close(shown, (texture + texture.roll(-1, 2)) / 2)


@pytest.mark.parametrize("texture", [3, None])
def test_only_visible_particles_get_gradients(teacher, tmp_path, texture):
    mesh = mesh_of(teacher, written(tmp_path, BENT), count=2, up="z", texture=texture, smooth=0.5)
    where = view(azimuth=20.0, elevation=15.0, distance=2.0)

    def look(_):
        found = mesh.look(where, 6)
        return found.images, found.terms["smooth"]

    assert torch.autograd.gradcheck(look, (mesh.state[0],))
    images, _ = look(None)
    images.square().sum().backward()
    assert mesh.state[0].grad.abs().max() > 0 and mesh.state[1].grad is None
    assert not torch.equal(mesh.state[0], mesh.state[1])


def test_the_total_variation_is_the_mean_difference_of_neighbours(teacher, tmp_path):
    file = written(tmp_path, BENT)
    textured = mesh_of(teacher, file, texture=4, smooth=2.0)
    paint(textured, (0.2 + 0.1 * torch.arange(4.0)).expand(3, 4, 4))
    assert_close(textured.look(view(), 8).terms["smooth"], torch.tensor([2 * 0.1 / 2]).double())
    coloured = mesh_of(teacher, file, smooth=2.0)
    number = coloured.surface.vertices.tolist().index([0, 0, 0])  # this vertex belongs to three of the five edges
    paint(coloured, torch.where(torch.arange(4)[:, None] == number, 0.7, 0.5).expand(4, 3))
    assert_close(coloured.look(view(), 8).terms["smooth"], torch.tensor([2 * 0.2 * 3 / 5]).double())
    assert not mesh_of(teacher, file).look(view(), 8).terms


def test_vertices_at_a_seam_are_merged_for_vertex_colours(teacher):
    assert len(load(CUBE).vertices) == 24
    assert mesh_of(teacher, CUBE).state[0].shape == (8, 3)
    assert mesh_of(teacher, CUBE, texture=16).state[0].shape == (3, 16, 16)


def test_a_random_background_is_grey_in_evaluation(teacher):
    mesh = mesh_of(teacher, CUBE, background="random", count=1)
    views = Views(torch.tensor([0, 0]), Cameras(*(torch.tensor([v, v]) for v in (0.0, 0.0, 3.0, 60.0))))
    corner = mesh.look(views, 8).images[:, :, 0, 0]
    assert not torch.equal(corner[0], corner[1])
    assert (mesh.eval().look(views, 8).images[:, :, 0, 0] == 0.5).all()


def test_the_teacher_gets_renders_whose_gradients_reach_the_texture(teacher):
    mesh = mesh_of(teacher, CUBE, texture=16).float()
    x, terms = mesh.render(mesh.draw(torch.tensor([0, 0])))
    x.square().sum().backward()
    assert x.shape == (2, 3, 8, 8) and not terms and mesh.state[0].grad.abs().max() > 0


# --- The cube, and axes ---


@pytest.mark.parametrize(("azimuth", "elevation"), [(0, 0), (90, 0), (180, 0), (-90, 0), (0, 90), (0, -90)])
def test_the_cube_covers_a_square_without_cracks(teacher, azimuth, elevation):
    side, half = 64, 1 / math.sqrt(3)
    look = mesh_of(teacher, CUBE).look(view(azimuth=azimuth, elevation=elevation), side)
    edge = half / ((3 - half) * math.tan(math.pi / 6))
    inside = ((torch.arange(side) + 0.5) / side * 2 - 1).abs() < edge
    assert torch.equal(look.opacity[0, 0] == 1, inside[:, None] & inside)
    assert abs(look.opacity.sum() - (edge * side) ** 2) < 4 * edge * side


@pytest.mark.parametrize(
    ("up", "seen"),
    [
        (None, {(0, 0): "+z", (90, 0): "+x", (180, 0): "-z", (-90, 0): "-x", (0, 90): "+y", (0, -90): "-y"}),
        ("z", {(0, 0): "+x", (90, 0): "+y", (180, 0): "-x", (-90, 0): "-y", (0, 90): "+z", (0, -90): "-z"}),
    ],
)
def test_each_side_of_the_cube_shows_its_face(teacher, up, seen):
    mesh = mesh_of(teacher, CUBE, up=up, texture=48)
    level = torch.arange(1, 7).view(2, 3) / 8.0  # the cells of the atlas in the order of the file
    paint(mesh, level.repeat_interleave(24, 0).repeat_interleave(16, 1).expand(3, 48, 48))
    for (azimuth, elevation), name in seen.items():
        centre = mesh.look(view(azimuth=azimuth, elevation=elevation), 9).images[0, :, 4, 4]
        assert round(centre.mean().item() * 8) - 1 == ["+z", "+x", "-z", "-x", "+y", "-y"].index(name), name


def test_a_mesh_is_centred_in_the_unit_ball_and_flat_triangles_are_not_seen(teacher, tmp_path):
    file = written(tmp_path, BENT + "v 10 15 12\nvt 0 0\nf 1/1 2/2 1/1\nf 5/5 5/5 5/5\n")
    mesh = mesh_of(teacher, file, up="z")
    assert mesh.corners.shape == (2, 3, 3)
    ends = mesh.corners.reshape(-1, 3)
    assert_close(ends.amin(0), -ends.amax(0))
    assert_close(ends.norm(dim=1).max(), torch.tensor(1.0).double())


def test_the_parts_of_a_scene_are_one_mesh(tmp_path):
    scene = trimesh.Scene()
    for x in (0.0, 5.0):
        scene.add_geometry(trimesh.creation.box(), transform=trimesh.transformations.translation_matrix([x, 0, 0]))
    scene.export(tmp_path / "two.glb")
    surface = load(tmp_path / "two.glb")
    assert surface.faces.shape == (24, 3) and surface.uv is None
    corners = surface.vertices[surface.faces]
    assert corners.min((0, 1)).tolist() == [-0.5, -0.5, -0.5] and corners.max((0, 1)).tolist() == [5.5, 0.5, 0.5]
    assert sorted(set(corners[..., 0].ravel())) == [-0.5, 0.5, 4.5, 5.5]


# --- Files ---


@pytest.mark.parametrize("up", ["y", "z"])
def test_a_texture_is_saved_in_a_mesh_that_looks_the_same(teacher, tmp_path, up):
    file = written(tmp_path, BENT)
    mesh = mesh_of(teacher, file, count=2, texture=8, up=up).float()
    mesh.state[1].data.normal_(0, 2)
    mesh.save(tmp_path)
    again = mesh_of(teacher, file, count=2, texture=8, up=up).float().load(tmp_path)
    where = Views(torch.tensor([1]), camera(20.0, 15.0, 2.0))
    assert torch.equal(again.look(where, 16).images, mesh.look(where, 16).images)

    own = tmp_path / "0001"
    assert {path.name for path in own.iterdir()} >= {"turntable.webp", "frames", "depth", "texture.png", "mesh.glb"}
    (part,) = trimesh.load_scene(own / "mesh.glb", process=False).geometry.values()
    source = load(file)
    assert_close(part.vertices, source.vertices, check_dtype=False, rtol=1e-6, atol=1e-6)
    assert_close(part.visual.uv, source.uv, rtol=1e-6, atol=1e-6)
    assert np.array_equal(part.faces, source.faces)
    pixels = np.asarray(Image.open(own / "texture.png"))
    assert np.array_equal(np.asarray(part.visual.material.baseColorTexture.convert("RGB")), pixels)
    assert abs(pixels / 255 - mesh.state[1].sigmoid().detach().permute(1, 2, 0).numpy()).max() < 0.51 / 255

    exported = mesh_of(teacher, own / "mesh.glb", texture=8)
    paint(exported, torch.from_numpy(pixels / 255).permute(2, 0, 1).clamp(1e-6, 1 - 1e-6))
    shown, given = exported.look(view(azimuth=20.0, elevation=15.0, distance=2.0), 16), mesh.look(where, 16)
    assert_close(shown.depth.float(), given.depth, rtol=1e-5, atol=1e-5)
    assert abs(shown.images - given.images).max() < 2 / 255


def test_vertex_colours_are_saved_as_linear_ones_in_the_mesh(teacher, tmp_path):
    mesh = mesh_of(teacher, CUBE)
    colours = torch.linspace(0.02, 0.98, 24).view(8, 3).double()
    paint(mesh, colours)
    mesh.save(tmp_path)
    assert not (tmp_path / "0000" / "texture.png").exists()
    part = trimesh.load_mesh(tmp_path / "0000" / "mesh.glb", process=False)
    order = [part.vertices.tolist().index(vertex) for vertex in mesh.surface.vertices.tolist()]
    linear = colours.numpy()
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)  # IEC 61966-2-1
    assert abs(part.visual.vertex_colors[order, :3] / 255 - linear).max() < 0.51 / 255


@pytest.mark.parametrize("kind", [".obj", ".ply", ".glb"])
def test_the_file_types_are_read_with_their_texture_coordinates(teacher, tmp_path, kind):
    source = load(CUBE)
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[255, 255, 255, 255])
    visual = trimesh.visual.TextureVisuals(uv=source.uv, material=material)
    trimesh.Trimesh(source.vertices, source.faces, visual=visual, process=False).export(tmp_path / f"cube{kind}")
    config = MeshConfig(path=str(tmp_path / f"cube{kind}"), texture=8)
    assert list(config.check()) == []
    (tmp_path / "stage").mkdir()
    config.prepare(tmp_path / "stage")
    mesh = config.create(RepresentationMaterials(teacher, 3, tmp_path / "stage"))
    assert isinstance(mesh, Mesh) and len(mesh.state) == 3 and isinstance(mesh.places, Tensor)
    found = mesh.surface
    assert_close(found.uv[found.faces], source.uv[source.faces], rtol=1e-6, atol=1e-6)
    assert_close(found.vertices[found.faces], source.vertices[source.faces], rtol=1e-6, atol=1e-6)
    assert config.axis() == ("z" if kind == ".ply" else "y")


@pytest.mark.parametrize(
    ("name", "text", "field", "problem"),
    [
        ("a.ply", "hello", "path", "it cannot be read as .ply"),
        ("a.glb", "hello", "path", "it cannot be read as .glb"),
        ("a.obj", FLAT.replace("3\n", "9\n"), "path", "it cannot be read as .obj"),
        ("a.stl", "hello", "path", "it is not an .obj, .ply or .glb file"),
        ("a.ply", PLY, "path", "it cannot be read as .ply"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\n", "path", "it has no triangles"),
        ("a.obj", FLAT, "path", "its triangles have no area"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nv inf 1 0\nf 1 2 3\nf 2 4 3\n", "path", "its triangles have no area, or"),
        ("a.obj", "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "texture", "the mesh has no UV coordinates"),
    ],
)
def test_an_unusable_file_is_refused_with_a_remedy(tmp_path, name, text, field, problem):
    config = MeshConfig(path=str(written(tmp_path, text, name)), texture=8)
    ((where, what),) = config.check()
    assert where == field and what.startswith(problem) and "; " in what
    (tmp_path / "stage").mkdir()
    with pytest.raises(StageError, match=f"^representation.{field}: {problem}"):
        config.prepare(tmp_path / "stage")


def test_the_content_of_the_mesh_decides_the_fingerprint_and_a_missing_file_blocks(tmp_path):
    head, _, _ = TINY.partition("  pairs:")

    def planned(file):
        things = f"kind: optimize, teacher: teacher, representation: {{name: mesh, path: {file}, texture: 8}}"
        training = "objective: sds, training: {steps: 1}"
        return plan_of(f"{head}  things: {{{things}, {training}}}\n", tmp_path / "store")["things"]

    copy = shutil.copyfile(CUBE, tmp_path / "copy.obj")
    other = written(tmp_path, CUBE.read_text().replace("0.5", "0.6"))
    here = planned(CUBE)
    assert here.state == "run" and here.artifact.fingerprint == planned(copy).artifact.fingerprint
    assert here.artifact.fingerprint != planned(other).artifact.fingerprint
    missing = planned(tmp_path / "missing.obj")
    assert missing.state == "blocked" and "missing.obj" in missing.why
    with pytest.raises(StageError, match=r"missing.obj cannot be copied"):
        missing.artifact.stage.representation.prepare(tmp_path)
