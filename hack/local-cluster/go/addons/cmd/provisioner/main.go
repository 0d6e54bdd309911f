// Command provisioner makes the local cluster's volumes: one folder below the
// state folder for each claim, published as a `local` PersistentVolume, so
// that the kubelet applies a pod's fsGroup to it.
//
// A storage class with the parameter `enforceSize: "true"` gets a loop-mounted
// ext4 file of the claim's size instead, so that a full disk is a real one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"sigs.k8s.io/sig-storage-lib-external-provisioner/v13/controller"
)

const (
	provisionerName      = "local-cluster.internvl.dev/folder"
	enforceSizeParameter = "enforceSize"
	hostnameLabel        = "kubernetes.io/hostname"
)

type folderProvisioner struct {
	root string
	node string
}

// Provision makes the folder of one claim and describes it as a volume.
func (p folderProvisioner) Provision(
	_ context.Context, options controller.ProvisionOptions,
) (*corev1.PersistentVolume, controller.ProvisioningState, error) {
	size := options.PVC.Spec.Resources.Requests[corev1.ResourceStorage]
	folder := filepath.Join(p.root, options.PVName)
	if err := os.MkdirAll(folder, 0o777); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	if options.StorageClass.Parameters[enforceSizeParameter] == "true" {
		if err := mountLoopFile(folder, size.Value()); err != nil {
			return nil, controller.ProvisioningFinished, err
		}
	}
	if err := os.Chmod(folder, 0o777); err != nil {
		return nil, controller.ProvisioningFinished, err
	}
	return &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: options.PVName},
		Spec: corev1.PersistentVolumeSpec{
			AccessModes:                   options.PVC.Spec.AccessModes,
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: size},
			PersistentVolumeReclaimPolicy: *options.StorageClass.ReclaimPolicy,
			PersistentVolumeSource: corev1.PersistentVolumeSource{
				Local: &corev1.LocalVolumeSource{Path: folder},
			},
			NodeAffinity: p.affinity(),
		},
	}, controller.ProvisioningFinished, nil
}

// Delete removes the folder of a volume that no claim wants any more.
func (p folderProvisioner) Delete(_ context.Context, volume *corev1.PersistentVolume) error {
	folder := volume.Spec.Local.Path
	if err := syscall.Unmount(folder, 0); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("unmount %s: %w", folder, err)
	}
	return errors.Join(os.RemoveAll(folder), os.RemoveAll(loopFile(folder)))
}

func (p folderProvisioner) affinity() *corev1.VolumeNodeAffinity {
	onThisNode := corev1.NodeSelectorRequirement{
		Key: hostnameLabel, Operator: corev1.NodeSelectorOpIn, Values: []string{p.node},
	}
	return &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{
		NodeSelectorTerms: []corev1.NodeSelectorTerm{
			{MatchExpressions: []corev1.NodeSelectorRequirement{onThisNode}},
		},
	}}
}

func loopFile(folder string) string { return folder + ".ext4" }

func mountLoopFile(folder string, bytes int64) error {
	if mounted, err := isMountPoint(folder); err != nil || mounted {
		return err
	}
	file := loopFile(folder)
	steps := [][]string{
		{"truncate", "--size", strconv.FormatInt(bytes, 10), file},
		{"mkfs.ext4", "-q", "-F", "-m", "0", "-E", "root_owner=0:0", file},
		{"mount", "-o", "loop", file, folder},
	}
	for _, step := range steps {
		if output, err := exec.Command(step[0], step[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w: %s", step, err, output)
		}
	}
	return nil
}

func isMountPoint(folder string) (bool, error) {
	var here, above syscall.Stat_t
	if err := errors.Join(syscall.Stat(folder, &here), syscall.Stat(filepath.Dir(folder), &above)); err != nil {
		return false, err
	}
	return here.Dev != above.Dev, nil
}

func main() {
	kubeconfig := flag.String("kubeconfig", "", "path of the kubeconfig")
	root := flag.String("root", "", "folder below which volumes are made")
	node := flag.String("node", "", "name of the node that holds them")
	flag.Parse()
	if err := run(*kubeconfig, *root, *node); err != nil {
		fmt.Fprintln(os.Stderr, "provisioner:", err)
		os.Exit(1)
	}
}

func run(kubeconfig, root, node string) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	controller.NewProvisionController(
		ctx, client, provisionerName, folderProvisioner{root: root, node: node},
		controller.LeaderElection(false),
	).Run(ctx)
	return nil
}
