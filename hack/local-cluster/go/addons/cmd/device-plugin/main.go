// Command device-plugin offers fake GPUs to the kubelet, through the same
// socket that a real device plugin uses.
//
// A device is marked unhealthy while its name stands in the health file, one
// name a line; the file may be absent.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	pluginapi "k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1"
)

const (
	socketName         = "internvl-fake-gpu.sock"
	pollInterval       = time.Second
	registerTimeout    = 10 * time.Second
	visibleDevicesName = "NVIDIA_VISIBLE_DEVICES"
)

type fakeGPUs struct {
	pluginapi.UnimplementedDevicePluginServer
	names         []string
	unhealthyFile string
}

func (g fakeGPUs) devices() []*pluginapi.Device {
	listed, _ := os.ReadFile(g.unhealthyFile)
	unhealthy := strings.Fields(string(listed))
	devices := make([]*pluginapi.Device, 0, len(g.names))
	for _, name := range g.names {
		health := pluginapi.Healthy
		for _, other := range unhealthy {
			if other == name {
				health = pluginapi.Unhealthy
			}
		}
		devices = append(devices, &pluginapi.Device{ID: name, Health: health})
	}
	return devices
}

func (fakeGPUs) GetDevicePluginOptions(context.Context, *pluginapi.Empty) (*pluginapi.DevicePluginOptions, error) {
	return &pluginapi.DevicePluginOptions{}, nil
}

// ListAndWatch sends the devices now and again whenever a health changes.
func (g fakeGPUs) ListAndWatch(_ *pluginapi.Empty, stream pluginapi.DevicePlugin_ListAndWatchServer) error {
	sent := ""
	ticks := time.NewTicker(pollInterval)
	defer ticks.Stop()
	for {
		devices := g.devices()
		if now := fmt.Sprint(devices); now != sent {
			if err := stream.Send(&pluginapi.ListAndWatchResponse{Devices: devices}); err != nil {
				return err
			}
			sent = now
		}
		select {
		case <-stream.Context().Done():
			return nil
		case <-ticks.C:
		}
	}
}

// Allocate names the granted devices in the variable that NVIDIA's runtime reads.
func (fakeGPUs) Allocate(_ context.Context, request *pluginapi.AllocateRequest) (*pluginapi.AllocateResponse, error) {
	response := &pluginapi.AllocateResponse{}
	for _, container := range request.ContainerRequests {
		response.ContainerResponses = append(response.ContainerResponses, &pluginapi.ContainerAllocateResponse{
			Envs: map[string]string{visibleDevicesName: strings.Join(container.DevicesIds, ",")},
		})
	}
	return response, nil
}

func main() {
	folder := flag.String("folder", pluginapi.DevicePluginPath, "the kubelet's device plugin folder")
	resource := flag.String("resource", "nvidia.com/gpu", "resource name")
	count := flag.Int("count", 0, "number of devices")
	unhealthy := flag.String("unhealthy-file", "", "file that lists unhealthy devices")
	flag.Parse()
	if err := run(*folder, *resource, *count, *unhealthy); err != nil {
		fmt.Fprintln(os.Stderr, "device-plugin:", err)
		os.Exit(1)
	}
}

func run(folder, resource string, count int, unhealthyFile string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	gpus := fakeGPUs{unhealthyFile: unhealthyFile}
	for index := range count {
		gpus.names = append(gpus.names, fmt.Sprintf("fake-gpu-%d", index))
	}
	path := filepath.Join(folder, socketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	pluginapi.RegisterDevicePluginServer(server, gpus)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	defer server.Stop()
	if err := register(ctx, folder, resource); err != nil {
		return err
	}
	return waitForKubeletRestart(ctx, path, failed)
}

func register(ctx context.Context, folder, resource string) error {
	ctx, cancel := context.WithTimeout(ctx, registerTimeout)
	defer cancel()
	target := "unix://" + filepath.Join(folder, filepath.Base(pluginapi.KubeletSocket))
	connection, err := grpc.NewClient(target, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = pluginapi.NewRegistrationClient(connection).Register(ctx, &pluginapi.RegisterRequest{
		Version: pluginapi.Version, Endpoint: socketName, ResourceName: resource,
		Options: &pluginapi.DevicePluginOptions{},
	})
	return err
}

// waitForKubeletRestart returns an error when the kubelet, at its start, has
// removed our socket: the supervisor then starts us, and we register, again.
func waitForKubeletRestart(ctx context.Context, path string, failed <-chan error) error {
	ticks := time.NewTicker(pollInterval)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-ticks.C:
			if _, err := os.Stat(path); err != nil {
				return fmt.Errorf("the kubelet has restarted: %w", err)
			}
		}
	}
}
